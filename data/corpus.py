"""A corpus: its sources, what they are tokenized with, and which documents are held out."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError
from data.config import DataConfig
from data.sources import Document, Mixture, Source, SourceError, Stream
from data.tokenizer import (
    END_OF_TEXT,
    SMALLEST_VOCABULARY,
    TextEncoder,
    load_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from data.tokens import MANIFEST

LAYOUT = 4  # of the folder; part of the recipe
#: A tokenizer is trained on so many bytes of training documents, or all there are.
TOKENIZER_BYTES = 256 << 20
ALL_THE_SAME = "the documents are all the same text: none can be held out for testing"
ONE_MORE = "another is needed, to be held out for testing"
#: Of a text that is streamed, so many bytes are read beforehand: for the tokenizer, if one is trained, and for
#: documents to hold out, of which there will be so many bytes at least.
HEAD_BYTES = 32 << 20
HELD_OUT_BYTES = 512 << 10
#: For that no more than this share of the documents is held out, if `val_fraction` is not more.
MOST_HELD_OUT = 0.1


@dataclass(frozen=True)
class Corpus:
    """What tokens are made from.

    Attributes:
        sources: of the documents.
        tokenizer: see `load_tokenizer`; `None`: a byte-level BPE trained on the training documents.
        vocab_size: ids of that BPE; means nothing for a given tokenizer.
        val_fraction: expected share of documents held out, chosen by the hash of their text. Of few documents, where
            none or all would be, one is on either side.
        deduplicate: whether only the first of documents with the same text is taken. Their hashes are kept in
            memory, some hundred bytes a document.
        max_tokens: an epoch ends with the document that reaches so many training tokens; `None`: with the text.
        streamed: whether the training text is tokenized while training, and not kept. Only the tokenizer and the
            held-out documents among the first `HEAD_BYTES` of text are prepared then.
    """

    sources: tuple[Source, ...]
    tokenizer: str | None = None
    vocab_size: int = 1 << 16
    val_fraction: float = 0.05
    deduplicate: bool = False
    max_tokens: int | None = None
    streamed: bool = False

    def recipe(self) -> dict[str, Any]:
        """Return everything on which the tokens depend."""
        tokenizer = {"vocab_size": self.vocab_size} if self.tokenizer is None else tokenizer_identity(self.tokenizer)
        mode = {"streamed": [HEAD_BYTES, HELD_OUT_BYTES, MOST_HELD_OUT]} if self.streamed else {}
        return mode | {
            "layout": LAYOUT,
            "sources": {source.name: source.identity() for source in self.sources},
            "tokenizer": tokenizer,
            "tokenizers": version("tokenizers"),
            "val_fraction": self.val_fraction,
            "deduplicate": self.deduplicate,
            "max_tokens": self.max_tokens,
        }

    def commits(self) -> dict[str, str]:
        """Return the commits of the sources on the hub, by name, as they are now."""
        now: dict[tuple[str | None, str | None], str | None] = {}
        for source in self.sources:
            if (source.hub, source.revision) not in now:  # those of one dataset must agree
                now[source.hub, source.revision] = source.commit()
        found = {source.name: now[source.hub, source.revision] for source in self.sources}
        return {name: commit for name, commit in found.items() if commit is not None}

    def at(self, commits: Mapping[str, str]) -> "Corpus":
        """Return the corpus as it was at some commits: what is begun is finished with the same text."""
        return replace(
            self,
            sources=tuple(s.model_copy(update={"revision": commits.get(s.name, s.revision)}) for s in self.sources),
        )

    def folder(self, cache: Path) -> Path:
        """Return where its tokens are or will be."""
        digest = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()
        return cache / f"{'stream' if self.streamed else 'tokens'}-{digest[:16]}"

    def vocabulary(self) -> int:
        """Return the number of ids that its tokens may have."""
        return self.vocab_size if self.tokenizer is None else load_tokenizer(self.tokenizer).size

    def size(self) -> int | None:
        """Return the bytes of text, about, where that can be had without reading it."""
        sizes = [source.size() for source in self.sources]
        return None if None in sizes else sum(sizes)  # type: ignore[arg-type]

    def estimate(self) -> int | None:
        """Return the bytes of text, about, to be read in an epoch; `None` if a source is on the hub."""
        sizes = [source.estimate() for source in self.sources]
        if None in sizes:
            return None
        weights = [source.weight for source in self.sources]
        first = min(size / weight for size, weight in zip(sizes, weights, strict=True))  # type: ignore[operator]
        return int(first * sum(weights))

    def check(self, cache: Path, sequence_length: int) -> None:
        """Find what can be found wrong without reading it all. Writes nothing.

        Raises:
            ValueError: a source or the tokenizer cannot be read, or the text is too short or the vocabulary too
                small. Sources of tokens that are prepared already are not read.
        """
        if self.tokenizer is None and self.vocab_size < SMALLEST_VOCABULARY:
            allowed = f"at least {SMALLEST_VOCABULARY}, all bytes and {END_OF_TEXT}"
            raise ConfigError("vocab_size", self.vocab_size, allowed)
        if self.streamed and self.deduplicate:
            problem = "is not possible with data.mode=stream: it needs data.mode=prepared"
            raise ConfigError("deduplicate", True, problem=problem)
        if (self.folder(cache) / MANIFEST).exists():
            return
        size = self.size()
        if size is not None and sequence_length >= size:
            raise too_long(sequence_length, f"the text has {size:,} bytes")
        for source in self.sources:
            first = list(itertools.islice(Stream(source), 2))
            if not first:
                raise source.error("holds no text")
            if len(first) + len(self.sources) == 2:
                raise source.error(f"is one document: {ONE_MORE}")


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
    threshold = corpus.val_fraction if threshold is None else threshold
    console.print(f"training a byte-level BPE of {corpus.vocab_size:,} tokens, once")
    documents = (document for document in Mixture(corpus.sources) if document.draw >= threshold)
    return train_tokenizer(_up_to(documents, max_bytes), corpus.vocab_size, progress=console.is_terminal)


def corpus_from(config: DataConfig) -> Corpus:
    """Return the corpus that a configuration describes.

    Raises:
        ConfigError: `path` is set, but none of the sources reads it.
    """
    sources = [
        Source(name=name, **settings.model_dump()) for name, settings in config.sources.items() if settings is not None
    ]
    if config.path is not None and config.path not in [source.path for source in sources]:
        names = ", ".join(source.name for source in sources)
        problem = f"is not read by any of the sources {names}: set sources.NAME.path, and hub=null"
        raise ConfigError("path", config.path, problem=problem)
    return Corpus(
        sources=tuple(sources),
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        val_fraction=config.val_fraction,
        deduplicate=config.deduplicate,
        max_tokens=None if config.max_tokens is None else int(config.max_tokens),
        streamed=config.mode == "stream",
    )


def too_long(sequence_length: int, held: str) -> SourceError:
    """Return the error about a text that is too short for one sequence."""
    problem = f"is longer than the text: {held}, and one sequence needs sequence_length + 1 tokens"
    return SourceError("sequence_length", sequence_length, problem=problem)


def _up_to(documents: Iterable[Document], size: int) -> Iterator[str]:
    for document in documents:
        yield document.text
        size -= document.size
        if size <= 0:
            return
