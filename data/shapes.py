"""The shapes of the files in a folder of tokens, and of positions in a text, for those who write and read them.

Names are those of the folder itself, and numbers fit one another, so that nothing outside the folder is read.
"""

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from common.reading import Record

_Many = Annotated[int, Field(ge=0, lt=2**53)]
_Some = Annotated[int, Field(ge=1, lt=2**53)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_PartName = Annotated[str, StringConstraints(pattern=r"^(train|test)-[0-9]{5,9}\.npy$")]
_PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")]


class File(Record):
    """Size and checksum of a file."""

    bytes: _Many
    sha256: _Sha256


class Part(Record):
    """A part of a split that has documents."""

    file: _PartName
    tokens: _Some
    documents: _Some
    bytes: _Some

    @property
    def documents_file(self) -> str:
        """Name of the file of the ends and digests of the documents."""
        return self.file.removesuffix(".npy") + ".documents.npy"


class Split(Record):
    """The training or the held-out documents."""

    tokens: _Many
    documents: _Many
    bytes: _Many
    parts: list[Part]

    @model_validator(mode="after")
    def _sums(self) -> Self:
        for name in ("tokens", "documents", "bytes"):
            if (total := getattr(self, name)) != sum(getattr(part, name) for part in self.parts):
                raise ValueError(f"the parts do not have {total:,} {name}")
        return self


class CacheKey(Record):
    """What the tokens depend on, see `Corpus.cache_key`."""

    layout: int
    sources: dict[str, dict[str, Any]]
    order: list[str]
    tokenizer: Any
    tokenizers: str
    val_fraction: float
    deduplicate: bool
    max_tokens: int | None


class Manifest(Record):
    """tokens.json."""

    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    end_of_text: _Many
    dtype: Literal["uint16", "uint32"]
    fingerprint: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    threshold: _Fraction | None = None
    duplicates: _Many = 0
    commits: dict[str, str]
    train: Split
    test: Split
    files: dict[_PlainName, File]
    cache_key: CacheKey
    paths: list[dict[str, str | None]]

    @model_validator(mode="after")
    def _fit_one_another(self) -> Self:
        if self.end_of_text >= self.vocab_size:
            raise ValueError(f"end_of_text={self.end_of_text} is not among vocab_size={self.vocab_size} ids")
        if self.vocab_size > np.iinfo(self.dtype).max + 1:
            raise ValueError(f"vocab_size={self.vocab_size} ids do not fit dtype={self.dtype}")
        for split, facts in (("train", self.train), ("test", self.test)):
            for part in facts.parts:
                if not part.file.startswith(split) or not {part.file, part.documents_file} <= self.files.keys():
                    raise ValueError(f"{part.file} is not a file of the {split} split with a checksum")
        if self.threshold is None and "streamed" in (self.cache_key.model_extra or {}):
            raise ValueError("a stream has a threshold")
        return self


class JournalPart(Record):
    """A split's share of a part, without a file if it has no documents."""

    file: _PartName | None
    tokens: _Many
    documents: _Many
    bytes: _Many


class JournalSplits(Record):
    """A part of each split."""

    train: JournalPart
    test: JournalPart


class MixtureState(Record):
    """A position in a mixture: by source, the bytes that were read and the position in its rows."""

    bytes_read: dict[str, _Many]
    streams: dict[str, dict[str, Any]]


class RowsState(Record):
    """A position in local files."""

    file: _Many
    row: _Many


class Journal(Record):
    """journal.json."""

    commits: dict[str, str]
    threshold: _Fraction
    lowest_hash_fraction: _Fraction
    highest_hash_fraction: _Fraction
    documents: _Many
    duplicates: _Many
    text_bytes: _Many
    bytes_read: dict[str, _Many]
    parts: list[JournalSplits]
    files: dict[_PlainName, File]
    mixture: MixtureState | None
    complete: bool

    @model_validator(mode="after")
    def _has_the_files(self) -> Self:
        names = {part.file for splits in self.parts for part in (splits.train, splits.test)} - {None}
        if not names <= self.files.keys():
            raise ValueError("a part has no checksum")
        return self


class StreamState(Record):
    """Where a block of a stream starts, see `data.stream.BlockStart`."""

    block: _Many
    first_sequence: _Many
    mixture: MixtureState | None
    epoch_tokens: _Many
    skipped_tokens: _Many
    block_sequences: _Some
    length: _Some


class LoaderState(Record):
    """A position in a run, as a checkpoint has it, see `data.loader.TrainLoader`."""

    sequences_consumed: _Many
    data_start: _Many = 0
    skipped_batches: _Many = 0
    fingerprint: str
    stream: StreamState | None = None

    @model_validator(mode="after")
    def _is_in_the_block(self) -> Self:
        if self.data_start > self.sequences_consumed:
            raise ValueError("it is before its data")
        if self.stream is not None and self.stream.first_sequence > self.sequences_consumed - self.data_start:
            raise ValueError("it is before its block")
        return self
