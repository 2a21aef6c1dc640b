"""From documents to prepared tokens: once, on all cores, and from where it stopped if it was stopped.

Tokens are written in parts that end with a document. After each part the journal is replaced, which lists the parts
that are whole and says where in the sources the next one begins; whatever else lies in the folder is overwritten. The
manifest that `open_tokens` wants is written last. Two processes that prepare the same thing take turns, and the
second finds it done. The folder is named by the recipe: the sources' identity, the tokenizer and the settings.
"""

import itertools
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from common.errors import ConfigError, UserError
from data.corpus import ALL_THE_SAME, ONE_MORE, Corpus, corpus_tokenizer, too_long
from data.encoding import BATCH_BYTES, ahead, batches
from data.sources import Document, Mixture
from data.stream import prepare_head
from data.tokenizer import TOKENIZER_FILES, TextEncoder, load_tokenizer
from data.tokens import MANIFEST, SPLITS, Tokens, documents_file, open_tokens, sealed, unsealed
from data.writing import alone, digest_key, keep_tokenizer, replace, write_manifest, write_part

PART_TOKENS = 1 << 26
JOURNAL = "journal.json"
#: Seconds between lines where there is no terminal for a bar.
SAY_EVERY = 30


def prepare(
    corpus: Corpus,
    cache: Path,
    sequence_length: int,
    console: Console | None = None,
    part_tokens: int = PART_TOKENS,
) -> Tokens:
    """Return the tokens of a corpus, from the cache where they are, else tokenizing and keeping them.

    Of a corpus that is streamed these are the held-out ones; there are none for training.

    Args:
        corpus: what to tokenize.
        cache: folder that holds one folder per recipe.
        sequence_length: tokens per training sequence; only checked, not part of what is cached.
        console: where to show progress; `None`: nowhere.
        part_tokens: tokens in a part, about; a preparation that was stopped goes on after its last whole part.

    Raises:
        ValueError: a source cannot be read, all documents are the same, the text is too short for one sequence, or
            the disk is full. The parts that are whole are kept, where they can be used.
    """
    console = console or Console(quiet=True)
    folder = corpus.folder(cache)
    if not (folder / MANIFEST).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with alone(cache / f".{folder.name}.lock", console):
                if not (folder / MANIFEST).exists():
                    if corpus.streamed:
                        prepare_head(corpus, folder, console)
                    else:
                        _Preparation(corpus, folder, console, part_tokens).run()
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be written ({error.strerror or error}): what is whole is kept, "
                "and the same command continues"
            ) from error
    tokens = open_tokens(folder)
    arrays = {"test": tokens.test} if corpus.streamed else {"training": tokens.train, "test": tokens.test}
    for split, array in arrays.items():
        if sequence_length >= len(array):
            raise too_long(sequence_length, f"the {split} text has {len(array):,} tokens")
    return tokens


class _Preparation:
    """One process at work on one folder."""

    def __init__(self, corpus: Corpus, folder: Path, console: Console, part_tokens: int) -> None:
        self.corpus, self.folder, self.console, self.part_tokens = corpus, folder, console, part_tokens
        self.recipe = corpus.recipe()
        self.journal: dict[str, Any] = {}

    @staticmethod
    def _new_journal(threshold: float, commits: dict[str, str]) -> dict[str, Any]:
        """What is known before the first document; `threshold`: documents whose draw is below are held out."""
        counts = dict.fromkeys(("documents", "duplicates", "text_bytes"), 0)
        draws = {"threshold": threshold, "least_draw": 1.0, "greatest_draw": 0.0}
        return {
            "commits": commits,
            "given": {},
            "parts": [],
            "state": None,
            "complete": False,
            "files": {},
            **counts,
            **draws,
        }

    def run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        journal = self.folder / JOURNAL
        if journal.exists():
            try:
                self.journal = unsealed(journal.read_text())
            except ValueError as error:
                raise UserError(f"{journal} is damaged ({error}): remove the folder {self.folder}") from error
            if self.journal["parts"]:
                self.console.print(f"continuing {self.folder} after part {len(self.journal['parts'])}")
        else:
            self.journal = self._new_journal(self.corpus.val_fraction, self.corpus.commits())
            replace(journal, sealed(self.journal))
        self.pinned = self.corpus.at(self.journal["commits"])
        while True:
            encoder = self._encoder()
            if not self.journal["complete"]:
                self._tokenize(encoder)
            threshold = self._threshold_for_both_splits()
            if threshold == self.journal["threshold"]:
                break
            self.console.print(f"starting over with val_fraction={threshold:.6g}, so that a document is on either side")
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.journal = self._new_journal(threshold, self.journal["commits"])
            replace(journal, sealed(self.journal))
        self._finish(encoder)

    def _encoder(self) -> TextEncoder:
        """Return the tokenizer: the one in the folder, or else the given one, or one trained now."""
        if (self.folder / TOKENIZER_FILES[-1]).exists():  # written last of its files
            return load_tokenizer(str(self.folder))
        if self.corpus.tokenizer is not None:
            encoder = load_tokenizer(self.corpus.tokenizer)
        else:
            encoder = corpus_tokenizer(self.pinned, self.console, threshold=self.journal["threshold"])
        keep_tokenizer(encoder, self.folder)
        return encoder

    def _tokenize(self, encoder: TextEncoder) -> None:
        journal, limit = self.journal, self.corpus.max_tokens or math.inf
        seen = self._digests() if self.corpus.deduplicate else set()
        held: dict[str, list[tuple[Document, np.ndarray]]] = {split: [] for split in SPLITS}
        tokens = {split: sum(part[split]["tokens"] for part in journal["parts"]) for split in SPLITS}
        written = sum(tokens.values())
        mixture = Mixture(self.pinned.sources, journal["state"])
        read = ahead(batches(mixture, min(BATCH_BYTES, self.part_tokens)))
        encoded = ahead((batch, encoder.encode([d.text for d in batch.documents])) for batch in read)
        started = said = time.monotonic()
        first_bytes = journal["text_bytes"]
        with _progress(self.console) as progress:
            bar = progress.add_task(
                "",
                total=limit if limit < math.inf else self.pinned.estimate(),
                documents=0,
                tokens=0,
                written=journal["text_bytes"],
            )
            for batch, arrays in encoded:
                for document, ids in zip(batch.documents, arrays, strict=True):
                    journal["documents"] += 1
                    journal["text_bytes"] += document.size
                    if self.corpus.deduplicate:
                        key = digest_key(document.digest)
                        if key in seen:
                            journal["duplicates"] += 1
                            continue
                        seen.add(key)
                    journal["least_draw"] = min(journal["least_draw"], document.draw)
                    journal["greatest_draw"] = max(journal["greatest_draw"], document.draw)
                    split = "test" if document.draw < journal["threshold"] else "train"
                    held[split].append((document, ids))
                    tokens[split] += len(ids)
                    if tokens["train"] >= limit:
                        break
                journal["given"] = batch.state["given"]
                done = tokens["train"] if self.corpus.max_tokens else journal["text_bytes"]
                total = sum(tokens.values())
                fields = {"documents": journal["documents"], "tokens": total, "written": journal["text_bytes"]}
                progress.update(bar, completed=done, **fields)
                if not self.console.is_terminal and time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    speed = (journal["text_bytes"] - first_bytes) / 1e6 / (said - started)
                    self.console.print(
                        f"tokenized {journal['documents']:,} documents, {total:,} tokens, {speed:.1f} MB/s"
                    )
                if tokens["train"] >= limit:
                    break
                if total - written >= self.part_tokens:
                    journal["state"] = batch.state
                    self._write_part(held, encoder)
                    held, written = {split: [] for split in SPLITS}, total
        journal["complete"] = True
        self._write_part(held, encoder)

    def _digests(self) -> set[int]:
        """Return what tells the documents of the parts already written."""
        found: set[int] = set()
        for part, split in itertools.product(self.journal["parts"], SPLITS):
            if part[split]["file"]:
                documents = np.load(documents_file(self.folder / part[split]["file"]))
                found.update(documents["digest"].tolist())
        return found

    def _write_part(self, held: dict[str, list[tuple[Document, np.ndarray]]], encoder: TextEncoder) -> None:
        """Write documents and their ids as the next part, if there are any, and the journal."""
        part, files = write_part(self.folder, len(self.journal["parts"]), held, encoder)
        if files:
            self.journal["files"] |= files
            self.journal["parts"].append(part)
        replace(self.folder / JOURNAL, sealed(self.journal))

    def _threshold_for_both_splits(self) -> float:
        """Return the threshold, moved as little as needed to leave a document on either side.

        Raises:
            ValueError: none does. Nothing is left of the preparation then.
        """
        threshold, least, greatest = (self.journal[key] for key in ("threshold", "least_draw", "greatest_draw"))
        if least >= greatest:
            shutil.rmtree(self.folder)
            if self.journal["documents"] - self.journal["duplicates"] > 1:
                raise UserError(ALL_THE_SAME)
            tokens = sum(part["train"]["tokens"] for part in self.journal["parts"])
            if self.corpus.max_tokens and tokens >= self.corpus.max_tokens:
                problem = f"is not allowed: the first document reaches it, and {ONE_MORE}"
                raise ConfigError("max_tokens", self.corpus.max_tokens, problem=problem)
            raise UserError(f"the text is one document: {ONE_MORE}")
        return min(max(threshold, math.nextafter(least, 1)), greatest)

    def _finish(self, encoder: TextEncoder) -> None:
        journal = self.journal
        facts = write_manifest(
            self.folder,
            self.recipe,
            encoder,
            journal["parts"],
            journal["files"],
            duplicates=journal["duplicates"],
            commits=journal["commits"],
        )
        (self.folder / JOURNAL).unlink(missing_ok=True)
        train, test = (facts[split]["tokens"] for split in SPLITS)
        self.console.print(f"tokenized {train:,} tokens for training, {test:,} held out")
        if len(journal["given"]) > 1:
            shares = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in journal["given"].items())
            self.console.print(f"read of each source, until one of them or data.max_tokens ended it: {shares}")


class _Speed(ProgressColumn):
    """Megabytes of text a second since the start of this process."""

    def __init__(self) -> None:
        super().__init__()
        self._first: int | None = None

    def render(self, task: Task) -> Text:
        written = task.fields["written"]
        if self._first is None:
            self._first = written
        return Text(f"{(written - self._first) / 1e6 / max(task.elapsed or 0, 1e-3):.1f} MB/s")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("tokenizing"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[documents]:,} documents {task.fields[tokens]:,} tokens"),
        _Speed(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
