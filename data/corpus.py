"""A corpus: its sources, its tokenizer, and which of its documents are held out."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError
from data.config import DataConfig
from data.content import ContentIndex, UnknownContentError, as_text
from data.sources import Document, MissingTextError, Mixture, Source, SourceError, Stream
from data.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, Tokenizer, load_tokenizer, tokenizer_identity, train_tokenizer
from data.tokens import MANIFEST, read_manifest

#: Version of the folder's layout, part of the cache key.
LAYOUT_VERSION = 6
#: Maximum bytes of training documents that a tokenizer is trained on.
TOKENIZER_BYTES = 256 << 20
#: Bytes of a streamed text that are read beforehand, to train a tokenizer and to hold documents out.
HEAD_BYTES = 32 << 20
#: Bytes of text that are held out of a streamed text, as long as that takes at most `MAX_HELD_OUT` of the documents.
HELD_OUT_BYTES = 512 << 10
#: Maximum share of the documents that `val_fraction` is raised to, to reach `HELD_OUT_BYTES`.
MAX_HELD_OUT = 0.1

ALL_THE_SAME = "the documents are all the same text: none can be held out for testing"
ONE_MORE = "another is needed, to be held out for testing"


@dataclass(frozen=True)
class Corpus:
    """What tokens are made from: sources, and settings of `DataConfig`.

    If `val_fraction` would hold out all documents or none, the split is moved so that each side has one. Deduplication
    keeps about a hundred bytes per document in memory. An epoch ends with the document that reaches `max_tokens`. Of a
    streamed corpus, only the tokenizer and the held-out documents, from the first `HEAD_BYTES` of text, are prepared.
    """

    sources: tuple[Source, ...]
    tokenizer: str | None = None
    vocab_size: int = 1 << 16
    val_fraction: float = 0.05
    deduplicate: bool = False
    max_tokens: int | None = None
    streamed: bool = False

    def cache_key(self, index: ContentIndex | None = None) -> dict[str, Any]:
        """Return everything that the tokens depend on, as plain values for JSON."""
        return self._cache_key({source.name: source.identity(index) for source in self.sources})

    def _cache_key(self, sources: dict[str, Any]) -> dict[str, Any]:
        tokenizer = {"vocab_size": self.vocab_size} if self.tokenizer is None else tokenizer_identity(self.tokenizer)
        mode = {"streamed": [HEAD_BYTES, HELD_OUT_BYTES, MAX_HELD_OUT]} if self.streamed else {}
        return mode | {
            "layout": LAYOUT_VERSION,
            "sources": sources,
            "order": list(sources),  # JSON objects have none
            "tokenizer": tokenizer,
            "tokenizers": version("tokenizers"),
            "val_fraction": self.val_fraction,
            "deduplicate": self.deduplicate,
            "max_tokens": self.max_tokens,
        }

    def with_content(self, index: ContentIndex) -> "Corpus":
        """Return the corpus pinned to the content that its local text has now, unless it is pinned already."""
        return replace(self, sources=tuple(s.pinned_to(s.content or s.text_digest(index)) for s in self.sources))

    def commits(self) -> dict[str, str]:
        """Return the present commit of each source on the hub, and the content of each that is pinned, by its name."""
        latest: dict[tuple[str | None, str | None], str | None] = {}
        for source in self.sources:
            if (source.hub, source.revision) not in latest:  # one lookup, so that subsets have the same commit
                latest[source.hub, source.revision] = source.commit()
        commits = {s.name: latest[s.hub, s.revision] or s.content for s in self.sources}
        return {name: commit for name, commit in commits.items() if commit is not None}

    def pinned_to(self, commits: Mapping[str, str]) -> "Corpus":
        """Return the corpus with these `commits` of its sources, so that no other text is read."""
        return replace(self, sources=tuple(source.pinned_to(commits.get(source.name)) for source in self.sources))

    def check_content(self) -> None:
        """Raise `SourceError` if a text is not the one that the corpus is pinned to."""
        for source in self.sources:
            source.check_content()

    def folder(self, cache: Path, index: ContentIndex | None = None) -> Path:
        """Return the folder in the cache that holds the tokens of this corpus, once they are prepared.

        Text that is not known by the index, by default that of the cache, is read.
        """
        key = self.cache_key(index or ContentIndex(cache))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return cache / f"{'stream' if self.streamed else 'tokens'}-{digest[:16]}"

    def find(self, cache: Path) -> Path | None:
        """Return the folder of the prepared tokens, if that is known without reading the text.

        If the text is not there any more, it is the only folder that was prepared from its path with these settings.

        Raises:
            SourceError: several were, of different texts.
        """
        try:
            folder = self.folder(cache, ContentIndex(cache, only_known=True))
        except UnknownContentError:
            return None
        except MissingTextError as error:
            return None if self.streamed else self._find_without_text(cache, error)
        return folder if (folder / MANIFEST).exists() else None

    def _find_without_text(self, cache: Path, missing: MissingTextError) -> Path | None:
        sources: dict[str, Any] = {}
        for source in self.sources:
            try:
                sources[source.name] = source.identity(ContentIndex(cache))
            except MissingTextError:
                sources[source.name] = {"column": source.column, "weight": source.weight}
        key, paths = self._cache_key(sources), self.paths()
        found = []
        for file in sorted(cache.glob(f"tokens-*/{MANIFEST}")):
            with suppress(ValueError, OSError):
                facts = read_manifest(file.parent)
                there = facts["cache_key"]
                for name, identity in there["sources"].items():
                    if "content" not in sources.get(name, {}):
                        identity.pop("content", None)
                if there == key and paths in facts["paths"]:
                    found.append(file.parent)
        if len(found) > 1:
            folders = " and ".join(map(str, found))
            problem = f"does not exist, and several texts there were prepared: remove all but one of {folders}"
            raise SourceError(missing.field, missing.value, problem=problem) from missing
        return found[0] if found else None

    def paths(self) -> dict[str, str | None]:
        """Return the path of each source as it is set, by its name."""
        return {source.name: None if source.path is None else as_text(source.path) for source in self.sources}

    def vocabulary(self) -> int:
        """Return the number of ids that the tokens may have."""
        return self.vocab_size if self.tokenizer is None else load_tokenizer(self.tokenizer).size

    def estimated_bytes(self) -> int | None:
        """Return the estimated bytes of text in an epoch; `None` if a source is on the hub."""
        sizes = [source.estimated_bytes() for source in self.sources]
        if None in sizes:
            return None
        weights = [source.weight for source in self.sources]
        shortest = min(size / weight for size, weight in zip(sizes, weights, strict=True))  # type: ignore[operator]
        return int(shortest * sum(weights))

    def check(self, cache: Path, sequence_length: int) -> None:
        """Raise `ConfigError` if the corpus cannot be prepared. Reads its first documents at most."""
        if self.tokenizer is None and self.vocab_size < MIN_VOCAB_SIZE:
            allowed = f"at least {MIN_VOCAB_SIZE}, all bytes and {END_OF_TEXT}"
            raise ConfigError("vocab_size", self.vocab_size, allowed)
        if self.streamed and self.deduplicate:
            problem = "is not possible with data.mode=stream: it needs data.mode=prepared"
            raise ConfigError("deduplicate", True, problem=problem)
        if self.find(cache) is not None:
            return
        sizes = [source.plain_bytes() for source in self.sources]
        if None not in sizes and sequence_length >= (size := sum(sizes)):  # type: ignore[arg-type]
            raise text_too_short(sequence_length, f"the text has {size:,} bytes")
        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        for source in self.sources:
            first_documents = list(itertools.islice(Stream(source), 2))
            if not first_documents:
                raise source.error("holds no text")
            if len(first_documents) == len(self.sources) == 1:
                raise source.error(f"is one document: {ONE_MORE}")
            if tokenizer is not None:
                tokenizer.encode([first_documents[0].text])


def corpus_from(config: DataConfig) -> Corpus:
    """Return the corpus that a configuration describes; raise `ConfigError` if no source reads its `path`."""
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


def corpus_tokenizer(
    corpus: Corpus, console: Console, max_bytes: int = TOKENIZER_BYTES, threshold: float | None = None
) -> Tokenizer:
    """Train a byte-level BPE on the training documents of a corpus, up to the one that reaches `max_bytes`.

    Documents with a `hash_fraction` below the threshold, by default `val_fraction`, are held out.
    """
    threshold = corpus.val_fraction if threshold is None else threshold
    console.print(f"training a byte-level BPE of {corpus.vocab_size:,} tokens, once")
    documents = (document for document in Mixture(corpus.sources) if document.hash_fraction >= threshold)
    return train_tokenizer(_texts(documents, max_bytes), corpus.vocab_size, progress=console.is_terminal)


def text_too_short(sequence_length: int, length: str) -> SourceError:
    """Return the error about a text that is too short for one sequence; `length` is a clause."""
    problem = f"is longer than the text: {length}, and one sequence needs sequence_length + 1 tokens"
    return SourceError("sequence_length", sequence_length, problem=problem)


def _texts(documents: Iterable[Document], max_bytes: int) -> Iterator[str]:
    remaining = max_bytes
    for document in documents:
        yield document.text
        remaining -= document.size
        if remaining <= 0:
            return
