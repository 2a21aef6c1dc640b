"""From documents to prepared tokens: once, on all cores, and from where it stopped if it was stopped.

Tokens are written in parts that end with a document. After each part the journal is replaced, which lists the parts
that are whole and says where in the sources the next one begins; whatever else lies in the folder is overwritten. The
manifest that `open_tokens` wants is written last. Two processes that prepare the same thing take turns, and the
second finds it done. The folder is named by the recipe: the sources' identity, the tokenizer and the settings.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data.sources import Document, Mixture, Source, Stream
from data.tokenizer import (
    END_OF_TEXT,
    SMALLEST_VOCABULARY,
    TextEncoder,
    load_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from data.tokens import DOCUMENT, MANIFEST, SPLITS, Tokens, checksum, documents_file, open_tokens

LAYOUT = 2  # of the folder; part of the recipe
PART_TOKENS = 1 << 26
#: A tokenizer is trained on so many bytes of training documents, or all there are.
TOKENIZER_BYTES = 256 << 20
#: Text given to the tokenizer at once: enough to keep all cores busy, little enough to see progress.
BATCH_BYTES = 4 << 20
JOURNAL = "journal.json"
#: Seconds between lines where there is no terminal for a bar.
SAY_EVERY = 30

Item = TypeVar("Item")


@dataclass(frozen=True)
class Corpus:
    """What tokens are made from.

    Attributes:
        sources: of the documents.
        tokenizer: see `load_tokenizer`; `None`: a byte-level BPE trained on the training documents.
        vocab_size: ids of that BPE; means nothing for a given tokenizer.
        test_fraction: expected share of documents held out, chosen by the hash of their text. Of few documents, where
            none or all would be, one is on either side.
        drop_duplicates: whether only the first of documents with the same text is taken. Their hashes are kept in
            memory, some hundred bytes a document.
        max_tokens: the preparation ends with the document that reaches so many training tokens; `None`: no limit.
    """

    sources: tuple[Source, ...]
    tokenizer: str | None = None
    vocab_size: int = 1 << 16
    test_fraction: float = 0.05
    drop_duplicates: bool = False
    max_tokens: int | None = None

    def recipe(self) -> dict[str, Any]:
        """Return everything on which the tokens depend."""
        tokenizer = {"vocab_size": self.vocab_size} if self.tokenizer is None else tokenizer_identity(self.tokenizer)
        return {
            "layout": LAYOUT,
            "sources": {source.name: source.identity() for source in self.sources},
            "tokenizer": tokenizer,
            "tokenizers": version("tokenizers"),
            "test_fraction": self.test_fraction,
            "drop_duplicates": self.drop_duplicates,
            "max_tokens": self.max_tokens,
        }

    def folder(self, cache: Path) -> Path:
        """Return where its tokens are or will be."""
        digest = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()
        return cache / f"tokens-{digest[:16]}"

    def vocabulary(self) -> int:
        """Return the number of ids that its tokens may have."""
        return self.vocab_size if self.tokenizer is None else load_tokenizer(self.tokenizer).size

    def size(self) -> int | None:
        """Return the bytes of text, about, where that can be had without reading it."""
        sizes = [source.size() for source in self.sources]
        return None if None in sizes else sum(sizes)  # type: ignore[arg-type]

    def check(self, cache: Path, sequence_length: int) -> None:
        """Find what can be found wrong without reading it all. Writes nothing.

        Raises:
            ValueError: a source or the tokenizer cannot be read, or the text is too short or the vocabulary too
                small. Sources of tokens that are prepared already are not read.
        """
        if self.tokenizer is None and self.vocab_size < SMALLEST_VOCABULARY:
            allowed = f"it must be at least {SMALLEST_VOCABULARY}, all bytes and {END_OF_TEXT}"
            raise ValueError(f"vocab_size={self.vocab_size} is not allowed: {allowed}")
        if (self.folder(cache) / MANIFEST).exists():
            return
        size = self.size()
        if size is not None and sequence_length >= size:
            raise ValueError(too_long(sequence_length, f"the text has {size:,} bytes"))
        for source in self.sources:
            if next(iter(Stream(source)), None) is None:
                raise ValueError(f"{source.place} holds no text")


def prepare(
    corpus: Corpus,
    cache: Path,
    sequence_length: int,
    console: Console | None = None,
    part_tokens: int = PART_TOKENS,
) -> Tokens:
    """Return the tokens of a corpus, from the cache where they are, else tokenizing and keeping them.

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
            with _alone(cache / f".{folder.name}.lock", console):
                if not (folder / MANIFEST).exists():
                    _Preparation(corpus, folder, console, part_tokens).run()
        except OSError as error:
            raise ValueError(
                f"{error.filename or folder} cannot be written ({error.strerror or error}): what is whole is kept, "
                "and the same command continues"
            ) from error
    tokens = open_tokens(folder)
    for split, array in (("training", tokens.train), ("test", tokens.test)):
        if sequence_length >= len(array):
            raise ValueError(too_long(sequence_length, f"the {split} text has {len(array):,} tokens"))
    return tokens


class _Batch(NamedTuple):
    """Documents to be encoded together, and the place in the sources after them."""

    documents: list[Document]
    state: dict[str, Any]


class _Preparation:
    """One process at work on one folder."""

    def __init__(self, corpus: Corpus, folder: Path, console: Console, part_tokens: int) -> None:
        self.corpus, self.folder, self.console, self.part_tokens = corpus, folder, console, part_tokens
        self.journal = self._new_journal(corpus.test_fraction)

    @staticmethod
    def _new_journal(threshold: float) -> dict[str, Any]:
        """What is known before the first document; `threshold`: documents whose draw is below are held out."""
        counts = dict.fromkeys(("documents", "duplicates", "text_bytes"), 0)
        draws = {"threshold": threshold, "least_draw": 1.0, "greatest_draw": 0.0}
        return {"parts": [], "state": None, "complete": False, "files": {}, **counts, **draws}

    def run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        journal = self.folder / JOURNAL
        if journal.exists():
            self.journal = json.loads(journal.read_text())
            self.console.print(f"continuing {self.folder} after part {len(self.journal['parts'])}")
        while True:
            encoder = self._encoder()
            if not self.journal["complete"]:
                self._tokenize(encoder)
            threshold = self._threshold_for_both_splits()
            if threshold == self.journal["threshold"]:
                break
            self.console.print(
                f"starting over with test_fraction={threshold:.6g}, so that a document is on either side"
            )
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.journal = self._new_journal(threshold)
            _replace(journal, json.dumps(self.journal))
        self._finish(encoder)

    def _encoder(self) -> TextEncoder:
        """Return the tokenizer: the one in the folder, or else the given one, or one trained now."""
        if (self.folder / "tokenizer_config.json").exists():  # written after tokenizer.json
            return load_tokenizer(str(self.folder))
        if self.corpus.tokenizer is not None:
            encoder = load_tokenizer(self.corpus.tokenizer)
        else:
            encoder = corpus_tokenizer(self.corpus, self.console, threshold=self.journal["threshold"])
        aside = self.folder / "tokenizer.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        encoder.save(aside)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _sync(aside / name)
            (aside / name).replace(self.folder / name)
        aside.rmdir()
        return encoder

    def _tokenize(self, encoder: TextEncoder) -> None:
        journal, limit = self.journal, self.corpus.max_tokens or math.inf
        seen = self._digests() if self.corpus.drop_duplicates else set()
        held: dict[str, list[tuple[Document, np.ndarray]]] = {split: [] for split in SPLITS}
        tokens = {split: sum(part[split]["tokens"] for part in journal["parts"]) for split in SPLITS}
        written = sum(tokens.values())
        mixture = Mixture(self.corpus.sources, journal["state"])
        batches = _ahead(_batches(mixture, min(BATCH_BYTES, self.part_tokens)))
        encoded = _ahead((batch, encoder.encode([d.text for d in batch.documents])) for batch in batches)
        started = said = time.monotonic()
        first_bytes = journal["text_bytes"]
        with _progress(self.console) as progress:
            bar = progress.add_task("", total=self._total(), documents=0, tokens=0, written=journal["text_bytes"])
            for batch, arrays in encoded:
                for document, ids in zip(batch.documents, arrays, strict=True):
                    journal["documents"] += 1
                    journal["text_bytes"] += document.size
                    if self.corpus.drop_duplicates:
                        key = _key(document.digest)
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

    def _total(self) -> float | None:
        return self.corpus.max_tokens or self.corpus.size()

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
        number, part = len(self.journal["parts"]), {}
        for split, documents in held.items():
            file = f"{split}-{number:05}.npy" if documents else None
            ids = np.concatenate([ids for _, ids in documents]) if documents else np.empty(0, encoder.dtype)
            part[split] = {
                "file": file,
                "tokens": len(ids),
                "documents": len(documents),
                "bytes": sum(document.size for document, _ in documents),
            }
            if file:
                index = np.empty(len(documents), DOCUMENT)
                index["end"] = np.cumsum([len(ids) for _, ids in documents])
                index["digest"] = [_key(document.digest) for document, _ in documents]
                path = self.folder / file
                for place, array in ((path, ids), (documents_file(path), index)):
                    self.journal["files"][place.name] = _save(place, array)
        if any(held.values()):
            self.journal["parts"].append(part)
        _replace(self.folder / JOURNAL, json.dumps(self.journal))

    def _threshold_for_both_splits(self) -> float:
        """Return the threshold, moved as little as needed to leave a document on either side.

        Raises:
            ValueError: none does. Nothing is left of the preparation then.
        """
        threshold, least, greatest = (self.journal[key] for key in ("threshold", "least_draw", "greatest_draw"))
        if least >= greatest:
            shutil.rmtree(self.folder)
            raise ValueError("the documents are all the same text: none can be held out for testing")
        return min(max(threshold, math.nextafter(least, 1)), greatest)

    def _finish(self, encoder: TextEncoder) -> None:
        files = dict(self.journal["files"])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": checksum(self.folder / name)}
        facts: dict[str, Any] = {
            "vocab_size": encoder.size,
            "end_of_text": encoder.end,
            "dtype": np.dtype(encoder.dtype).name,
            "duplicates": self.journal["duplicates"],
        }
        for split in SPLITS:
            parts = [part[split] for part in self.journal["parts"] if part[split]["file"]]
            totals = {key: sum(part[key] for part in parts) for key in ("documents", "bytes", "tokens")}
            facts[split] = totals | {"parts": parts}
        whole = json.dumps([facts["dtype"], encoder.end, sorted((n, f["sha256"]) for n, f in files.items())])
        facts["fingerprint"] = hashlib.sha256(whole.encode()).hexdigest()[:16]
        facts |= {"files": files, "recipe": self.corpus.recipe()}
        _replace(self.folder / MANIFEST, json.dumps(facts, indent=1))
        (self.folder / JOURNAL).unlink(missing_ok=True)
        train, test = (facts[split]["tokens"] for split in SPLITS)
        self.console.print(f"tokenized {train:,} tokens for training, {test:,} held out")


def corpus_tokenizer(
    corpus: Corpus, console: Console, max_bytes: int = TOKENIZER_BYTES, threshold: float | None = None
) -> TextEncoder:
    """Train a byte-level BPE on the training documents of a corpus.

    Args:
        corpus: whose `vocab_size` the tokenizer gets.
        console: where to say so, and on a terminal to show progress.
        max_bytes: text to learn from; what comes after it is not read.
        threshold: documents whose draw is below are left out. Default: those held out for testing.
    """
    threshold = corpus.test_fraction if threshold is None else threshold
    console.print(f"training a byte-level BPE of {corpus.vocab_size:,} tokens, once")
    texts = (document.text for document in Mixture(corpus.sources) if document.draw >= threshold)
    return train_tokenizer(_up_to(texts, max_bytes), corpus.vocab_size, progress=console.is_terminal)


def too_long(sequence_length: int, held: str) -> str:
    """Say that a text is too short for one sequence."""
    return (
        f"sequence_length={sequence_length} is longer than the text: {held}, "
        "and one sequence needs sequence_length + 1 tokens"
    )


def _batches(mixture: Mixture, batch_bytes: int) -> Iterator[_Batch]:
    documents: list[Document] = []
    size = 0
    for document in mixture:
        documents.append(document)
        size += len(document.text)
        if size >= batch_bytes:
            yield _Batch(documents, mixture.state())
            documents, size = [], 0
    if documents:
        yield _Batch(documents, mixture.state())


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, the next one being made in a thread meanwhile."""
    iterator, end = iter(items), object()  # a StopIteration cannot come out of a future
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def _up_to(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[-8:])


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array whole or not at all; return its size and checksum."""
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        # np.save would not say why it could not write.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    found = {"bytes": aside.stat().st_size, "sha256": checksum(aside)}
    aside.replace(path)
    return found


def _replace(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    _sync(aside)
    aside.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _alone(path: Path, console: Console) -> Iterator[None]:
    """Hold a lock, which the system releases however this process ends; say so if another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("waiting for another process that prepares the same tokens")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
