"""Where documents come from: files or the hub, read as streams, mixed by weight.

Reading is left to the `datasets` library, in its streaming mode: it knows the formats and compressions, the hub, and
where in a stream it is. Here documents get a digest, several streams become one, and what goes wrong gets the name of
its file. The mixture draws nothing at random: the next document comes from the source that is furthest behind its
share of the bytes, so it is the same in every run, and its place is a number of bytes and a place in each stream.
"""

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ConfigError
from data.config import SourceConfig
from data.files import FORMATS, format_of, has_column, is_empty, json_object, matching, sotu_folder, text_ratio

ROWS_WITHOUT = 1000  # at the beginning, and the column is said not to be there
ALLOWED = "it must be a file, a folder or a pattern of .txt, .jsonl or .parquet files, the first two also .gz .zst .xz"


class SourceError(ConfigError):
    """A source cannot be read, or its text is too short; the message is one sentence that names the setting."""


class Document(NamedTuple):
    """One text without surrounding space, never empty; SHA-256 and number of its UTF-8 bytes."""

    text: str
    digest: bytes
    size: int

    @property
    def draw(self) -> float:
        """A number in [0, 1) that depends on the text alone: below the test fraction, the document is held out."""
        return int.from_bytes(self.digest[:6]) / 256**6


class Source(SourceConfig):
    """One place that documents come from, with the settings of `SourceConfig`."""

    name: str
    """Name by which it is configured."""

    def error(self, problem: str, field: str | None = None) -> SourceError:
        """Return an error about one of the settings; by default about the path or the dataset on the hub."""
        field = field or ("hub" if self.hub else "path")
        return SourceError(f"sources.{self.name}.{field}", getattr(self, field), problem=problem)

    def files(self) -> list[Path]:
        """Return the local files that hold anything, in order of their names.

        Raises:
            ValueError: there are none, or they are of several formats.
        """
        if self.path is None:
            try:
                return sorted(sotu_folder().rglob("*.txt"))
            except ModuleNotFoundError as error:
                raise self.error(str(error)) from error
        root = Path(self.path)
        found = [root] if root.is_file() else root.rglob("*") if root.is_dir() else matching(root)
        files = sorted(file for file in found if file.is_file() and (root.is_file() or format_of(file)))
        if not files:
            found_nothing = "holds no such file" if root.is_dir() else "does not exist"
            raise self.error(f"{found_nothing}: {ALLOWED}")
        formats = {format_of(file) for file in files}
        if None in formats:
            raise self.error(f"is of no format that is known: {ALLOWED}")
        if len(formats) > 1:
            raise self.error("holds files of several formats: give each a source of its own")
        files = [file for file in files if not is_empty(file)]
        if not files:
            raise self.error(f"holds nothing but empty files: {ALLOWED}")
        return files

    def size(self) -> int | None:
        """Return the bytes of text, about, where that can be had without reading it."""
        if self.hub is not None:
            return None
        files = self.files()
        plain = all(file.suffix in FORMATS and file.suffix != ".parquet" for file in files)
        return sum(file.stat().st_size for file in files) if plain else None

    def estimate(self) -> int | None:
        """Return the bytes of text that the files seem to hold, by their sizes and the beginning of the first.

        Raises:
            SourceError: that one cannot be read.
        """
        if self.hub is not None:
            return None
        files = self.files()
        try:
            return int(sum(file.stat().st_size for file in files) * text_ratio(files[0], self.column))
        except Exception as error:  # each format and compression has its own
            raise self.error(f"cannot be read: {files[0]}: {_reason(error)}") from error

    def identity(self) -> dict[str, Any]:
        """Return what tells this text from another without reading it: files' names, sizes and times, or a revision."""
        if self.hub is not None:
            where: Any = [self.hub, self.subset, self.split, self.revision]
        elif self.path is None:
            return {"sotu": version("sotu"), "weight": self.weight}
        else:
            stats = [(file, file.stat()) for file in self.files()]
            where = [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
        return {"where": where, "column": self.column, "weight": self.weight}

    def commit(self) -> str | None:
        """Return the commit that `revision` stands for now in a dataset on the hub; `None` if it is not on the hub.

        Raises:
            SourceError: the hub does not say.
        """
        if self.hub is None:
            return None
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.hub, revision=self.revision).sha
        except Exception as error:
            raise self.error(f"cannot be opened ({_reason(error)})") from error

    def open(self) -> Any:
        """Return the `datasets.IterableDataset` of this source's rows.

        Raises:
            SourceError: it cannot be opened.
        """
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is raised as well, and named below
        files = self.files() if self.hub is None else []
        try:
            if self.hub is not None:
                return datasets.load_dataset(
                    self.hub, self.subset, split=self.split, revision=self.revision, streaming=True
                )
            kind = format_of(files[0])
            # Only one column is wanted: whatever the others hold must not stop the reading. Lines are parsed here.
            how: dict[str, Any] = {}
            if kind in ("text", "lines"):
                how = {"sample_by": "document" if kind == "text" else "line"}
            elif kind == "parquet" and has_column(files[0], self.column):
                how = {"columns": [self.column]}
            kind = "text" if kind == "lines" else kind
            # Without a list of names the library takes brackets and stars in them for patterns.
            names = [glob.escape(str(file.resolve())) for file in files]
            return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **how)
        except Exception as error:
            raise self.error(f"cannot be opened ({_reason(error)})") from error


class Stream:
    """The documents of one source, from wherever it stands.

    Args:
        source: to read.
        state: of an earlier stream of the same source, to go on after the document it gave last.
    """

    def __init__(self, source: Source, state: Mapping[str, Any] | None = None) -> None:
        self.source = source
        kind = None if source.hub is not None else format_of(source.files()[0])
        self.column = "text" if kind == "text" else source.column
        self._lines = kind == "lines"
        self._rows = source.open()
        self._state = None if state is None else dict(state)  # until the first document is asked for
        if self._state is not None:
            self._rows.load_state_dict(self._state)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that are not empty.

        Raises:
            SourceError: something cannot be read, or there is no such column; the message names the file.
        """
        rows = iter(self._rows)
        seen = self._state is not None  # whether there is the column; then an earlier stream has looked
        without: list[Any] = []  # rows before the first that has it
        while True:
            try:
                row = next(rows)
                self._state = None
                if self._lines:
                    row = json_object(row["text"])
            except StopIteration:
                if without:
                    raise self._no_column(without[0]) from None
                return
            except Exception as error:  # each format and compression has its own
                raise self.source.error(f"cannot be read: {self._file()}{_reason(error)}") from error
            if not row:
                continue
            if self.column not in row:
                if not seen:
                    without.append(row)
                if len(without) == ROWS_WITHOUT:
                    raise self._no_column(without[0])
                continue
            text, seen = row[self.column], True
            without.clear()
            if text is not None and not isinstance(text, str):
                raise self.source.error(f"holds {str(text)[:50]!r}, which is no text", "column")
            if text and (text := text.strip()):
                try:
                    encoded = text.encode()
                except UnicodeEncodeError as error:
                    raise self.source.error(f"cannot be read: {self._file()}{error}") from error
                yield Document(text, hashlib.sha256(encoded).digest(), len(encoded))

    def state(self) -> dict[str, Any]:
        """Return the place after the last document, as JSON holds it."""
        return self._rows.state_dict() if self._state is None else self._state

    def _no_column(self, row: Iterable[str]) -> SourceError:
        """Say that there is no such column in any row seen, of which this is one."""
        columns = ", ".join(map(str, row)) or "no columns"
        where = self.source.hub or self.source.path
        return self.source.error(f"is not there: the rows of {where} have {columns}", "column")

    def _file(self) -> str:
        """The file being read, for messages; nothing if it is not known."""
        if self.source.hub is not None:
            return ""
        try:
            files, index = self.source.files(), _shard(self._rows.state_dict())
        except ValueError:
            return ""  # there are none any more
        return f"{files[index]}: " if index is not None and index < len(files) else ""


class Mixture:
    """Several sources as one stream of documents; it ends where the first of them ends.

    Args:
        sources: at least one; names differ.
        state: of an earlier mixture of the same sources, to go on after the document it gave last.
    """

    def __init__(self, sources: Sequence[Source], state: Mapping[str, Any] | None = None) -> None:
        self.sources = list(sources)
        self.streams = {s.name: Stream(s, state["streams"][s.name] if state else None) for s in self.sources}
        self.given: dict[str, int] = dict(state["given"]) if state else {s.name: 0 for s in self.sources}

    def __iter__(self) -> Iterator[Document]:
        """Yield documents, each from the source furthest behind its weight."""
        streams = {name: iter(stream) for name, stream in self.streams.items()}
        while True:
            source = min(self.sources, key=lambda source: self.given[source.name] / source.weight)
            document = next(streams[source.name], None)
            if document is None:
                return
            self.given[source.name] += document.size
            yield document

    def state(self) -> dict[str, Any]:
        """Return the place after the last document, as JSON holds it."""
        return {"given": dict(self.given), "streams": {name: stream.state() for name, stream in self.streams.items()}}


def _shard(state: Any) -> int | None:
    """The number of the file in a stream's state: the innermost `shard_idx`."""
    if not isinstance(state, Mapping):
        return None
    return state.get("shard_idx", next((i for v in state.values() if (i := _shard(v)) is not None), None))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text[:200]}{'...' if len(text) > 200 else ''}" or type(error).__name__
