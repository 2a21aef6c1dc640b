"""Files that are complete or absent, locks, and writing that never leaves the folder it is meant for.

A run folder may come from somebody else, with links in it. A file is therefore made under a new random name and then
takes the place of what has its name. Files that are appended to, locks, and folders in a run folder are no links.
"""

import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from common.errors import UserError
from common.reading import open_regular

#: Beginnings of the names of files and folders that are being written or removed.
SAVING, REMOVING = ".saving-", ".removing-"

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def tmp_path(path: Path, token: str | None = None) -> Path:
    """Return a name beside `path` under which it is written: with a given token, or a new random one."""
    return path.with_name(f"{SAVING}{token or secrets.token_hex(8)}-{path.name}")


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path`, complete and on the disk, when the block ends without an error.

    Raises:
        IsADirectoryError: a folder stands in its place.
    """
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = tmp_path(path)
    descriptor = os.open(temporary, _NEW_FILE, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it has its name, see `remove_leftovers`
            yield file
            file.flush()
            os.fsync(descriptor)
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there complete or not at all, whatever happens meanwhile."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that gets the name `path`, complete and on the disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as temporary:
        yield temporary
        commit(temporary, path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `path`, which is removed when the block ends, unless it has another name then.

    Those that killed processes left of this name are removed before.
    """
    remove_leftovers(path.parent, path.name)
    temporary = tmp_path(path)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # otherwise it is a leftover
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def open_append(path: Path) -> BinaryIO:
    """Open a file, which may not exist, for appending without a buffer.

    Raises:
        OSError: a link or a device stands in its place.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        if path.lstat().st_nlink > 1 and path.is_file():  # the other name, of a copy of the folder, keeps its content
            write_atomic(path, path.read_bytes())
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a file", str(path))
    return os.fdopen(descriptor, "ab", buffering=0)


def make_dir(path: Path) -> None:
    """Make a folder in a run folder or cache, unless it is there.

    Raises:
        UserError: a link or a file stands in its place.
    """
    refuse_link(path)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{path} is not a folder: remove it") from error


def refuse_link(path: Path) -> None:
    """Raise `UserError` if a link stands in the place of a file or folder that other programs write to."""
    if path.is_symlink():
        raise UserError(f"{path} is a link: what is written there must stay in its folder; remove the link")


def refuse_folder(path: Path) -> None:
    """Raise `UserError` if a folder stands in the place of a file."""
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path} is a folder, where a file is to be: remove it")


def commit(temporary: Path, path: Path) -> None:
    """Give a file or folder its final name once the disk holds it. What has that name is replaced."""
    for written in [*temporary.rglob("*"), temporary]:
        sync(written)
    if path.is_symlink() or path.is_dir():  # folders are not replaced
        remove(path)
    temporary.replace(path)
    sync(path.parent)


def commit_new(temporary: Path, path: Path) -> None:
    """Give a folder its final name once the disk holds it; raise `OSError` if anything but an empty folder has it."""
    for written in [*temporary.rglob("*"), temporary]:
        sync(written)
    temporary.rename(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file, folder or link. A folder that is removed in part never has its old name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    elif path.name.startswith((SAVING, REMOVING)):
        shutil.rmtree(path)
    else:
        shutil.rmtree(path.rename(path.with_name(f"{REMOVING}{secrets.token_hex(8)}-{path.name}")))


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed processes were writing in a folder, under this name; what is still written is kept."""
    for leftover in folder.glob(f"{SAVING}*-{glob.escape(name) or '*'}"):
        if leftover.is_symlink() or not is_locked(leftover):
            remove(leftover)


def is_local(name: str) -> bool:
    """Whether a setting is a path here, and not a name `owner/name` on the Hugging Face hub.

    A folder that is gone must not become somebody's name on the hub: a name whose owner is a folder here is a path.
    """
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(".json")
    return not is_name or os.path.lexists(name) or os.path.lexists(name.partition("/")[0])


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal; a FIFO or device in its place is an `OSError`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def hold_lock(path: Path, seconds: float = -1) -> Iterator[None]:
    """Hold a lock file until the block ends. The system releases it however the process ends.

    Args:
        path: The lock file, which is made, and never truncated.
        seconds: How long to wait for another process that holds it; -1: for ever.

    Raises:
        TimeoutError: another process still holds it.
        UserError: a link or a folder stands in its place, or it has another name too: a process that holds the lock of
            that name would wait for itself.
    """
    refuse_link(path)
    refuse_folder(path)
    if path.exists() and path.stat().st_nlink > 1:
        raise UserError(f"{path} has other names too: a lock must have one; remove it")
    with FileLock(path, seconds):
        yield


def is_locked(path: Path) -> bool:
    """Whether a process on this machine, or on one that shares locks with it, holds the lock of a file.

    The probe only reads, so that it works in somebody else's folder, where the lock cannot be taken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
