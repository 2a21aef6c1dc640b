"""Files by their content: neither the place nor the times of a text matter.

The content of a file is its SHA-256. To read a file once, the cache keeps the hash with the file's path, size, times
and inode. A file is hashed again if any of them changes. An index that is missing, damaged or not writable costs time.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from common.errors import UserError
from common.files import hold_lock, remove_leftovers, sha256, write_atomic
from common.reading import parse_json, read_bytes
from data.progress import progress

#: Bytes of text from which it is said that they are hashed, which takes seconds.
MANY_BYTES = 1 << 30
#: Most bytes of an index: that of some million files.
MOST_INDEX = 1 << 30


class UnknownContentError(Exception):
    """The content of a file is not known without reading it."""


class _Stamp(NamedTuple):
    """What changes whenever a file is changed, moved or replaced. Nobody can set the time of the change (`ctime`)."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> "_Stamp":
        status = file.stat()
        path = as_text(file.absolute())
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


#: Hashes that this process has computed, or read from a cache.
_known: dict[_Stamp, str] = {}


class ContentIndex:
    """The SHA-256 of files, in part from a cache folder, if there is one.

    If `only_known`, no file is read or written: `UnknownContentError` is raised instead.
    """

    def __init__(self, cache: Path | None = None, console: Console | None = None, only_known: bool = False) -> None:
        self.cache = cache
        self.console = console or Console(quiet=True)
        self.only_known = only_known

    def digests(self, text: str, files: Sequence[Path]) -> list[str]:
        """Return the SHA-256 of the files, in hexadecimal. `text` is the path from which they were found.

        Raises:
            OSError: a file cannot be read, or is changed meanwhile.
        """
        stamps = {_Stamp.of(file): file for file in files}
        if not stamps.keys() <= _known.keys():
            name = hashlib.sha256(as_text(Path(text).absolute()).encode()).hexdigest()[:16]
            self._learn(stamps, None if self.cache is None else self.cache / f".text-{name}.json")
        return [_known[stamp] for stamp in stamps]

    def _learn(self, stamps: dict[_Stamp, Path], index: Path | None) -> None:
        """Make the content of files known, from the index if it is there, else by reading them."""
        if index is not None:
            _known.update(_read(index))
        if self.only_known:
            if not stamps.keys() <= _known.keys():
                raise UnknownContentError
            return
        with _locked(index):
            if index is not None:
                _known.update(_read(index))
            unknown = {stamp: file for stamp, file in stamps.items() if stamp not in _known}
            try:
                self._hash(unknown)
            finally:
                if unknown and index is not None:
                    with suppress(OSError):
                        write_atomic(index, json.dumps([[*s, _known[s]] for s in stamps if s in _known]))

    def _hash(self, files: dict[_Stamp, Path]) -> None:
        total, done = sum(stamp.size for stamp in files), 0
        console = self.console if total >= MANY_BYTES else Console(quiet=True)
        console.print(f"hashing {total / 1e9:,.1f} GB of text, once, to know it by its content")
        with progress(console, "hashing") as report, ThreadPoolExecutor() as pool:
            for stamp, digest in zip(files, pool.map(_digest, files, files.values()), strict=True):
                _known[stamp], done = digest, done + stamp.size
                report(done, total, f"hashed {done / 1e9:,.1f} GB of {total / 1e9:,.1f} GB of text")


def as_text(path: Path | str) -> str:
    """Return a path as JSON takes it: bytes that are not UTF-8 are escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def _digest(stamp: _Stamp, file: Path) -> str:
    digest = sha256(file)
    if _Stamp.of(file) != stamp:
        raise OSError(0, "it is being changed: wait until it is complete", str(file))
    return digest


@contextmanager
def _locked(index: Path | None) -> Iterator[None]:
    """Let one process at a time hash the same text, where the cache can be written."""
    with ExitStack() as stack:
        if index is not None:
            with suppress(OSError, UserError):
                index.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_lock(index.with_suffix(".lock")))
                remove_leftovers(index.parent)
        yield


def _read(index: Path) -> dict[_Stamp, str]:
    """Return the hashes in an index: none if it is missing or damaged."""
    try:
        rows = parse_json(read_bytes(index, MOST_INDEX))
        return {_Stamp(*row[:5]): row[5] for row in rows if list(map(type, row)) == [str, int, int, int, int, str]}
    except (OSError, ValueError, TypeError):
        return {}
