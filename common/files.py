"""Files that are complete or absent, a check whether a lock is held, and JSON that is checked when it is read."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError


def tmp_path(path: Path) -> Path:
    """Return the temporary name under which a file or folder is written."""
    return path.with_name(f".saving-{path.name}")


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path`, complete and on the disk, when the block ends without an error."""
    temporary = tmp_path(path)
    with temporary.open("wb") as file:
        yield file
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there complete or not at all, whatever happens meanwhile."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def commit(temporary: Path, path: Path) -> None:
    """Give a file or folder its final name once the disk holds it. A folder of that name is replaced."""
    for written in [*temporary.rglob("*"), temporary]:
        sync(written)
    if path.is_dir():  # folders are not replaced
        remove(path)
    temporary.replace(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder. A folder that is removed in part never has its old name."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(f".removing-{path.name}")))
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_locked(path: Path) -> bool:
    """Whether a process on this machine, or on one that shares locks with it, holds a `FileLock`.

    The probe only reads, so that it works in somebody else's folder, where the lock cannot be taken.
    """
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise `UserError` if it is not JSON, or not an object."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the same command makes it again") from error
    return content
