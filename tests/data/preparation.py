"""A small text, and its preparation as a job of `processes`."""

import itertools
import json
import os
import random
import resource
import signal
from pathlib import Path

from common.console import make_console
from data import Corpus, Source, prepare

#: Tokens of a part, of which the text has more than ten.
PART_TOKENS = 600


def write_lines(file: Path, documents: int = 300, duplicates: int = 20) -> Path:
    """Write short documents of random words, then some of them again."""
    rng = random.Random(0)
    words = ["the", "state", "of", "our", "union", "is", "strong,", "and", "naïve", "cafés", "in", "東京", "have", "🎉"]
    texts = [f"{i} " + " ".join(rng.choices(words, k=rng.randint(3, 30))) for i in range(documents - duplicates)]
    texts += texts[:duplicates]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def corpus_of(path: Path, **settings) -> Corpus:
    return Corpus((Source(name="text", path=str(path)),), **{"vocab_size": 300, "val_fraction": 0.2, **settings})


def prepare_lines(path: Path, cache: Path, max_syncs: int | None = None, max_file_bytes: int | None = None) -> None:
    """Prepare the text in `path` as a program does.

    The process kills itself after so many synchronizations with the disk. A limit on the size of files stands in for a
    full disk.
    """
    if max_syncs is not None:
        sync, syncs = os.fsync, itertools.count(1)

        def sync_or_die(descriptor: int) -> None:
            sync(descriptor)
            if next(syncs) == max_syncs:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = sync_or_die
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    console = make_console(force_terminal=False)
    prepare(corpus_of(path, deduplicate=True), cache, 16, console, PART_TOKENS)
