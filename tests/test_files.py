"""Files and locks of the ground floor."""

import pytest
from filelock import FileLock

from common.files import is_locked, write_atomic


def test_lock_is_seen_by_readers_and_excludes_others(tmp_path):
    lock = tmp_path / ".lock"
    assert not is_locked(lock) and not lock.exists(), "a probe makes no file"
    with FileLock(lock):
        assert is_locked(lock)
        with pytest.raises(TimeoutError), FileLock(lock, timeout=0):
            pass
    assert not is_locked(lock)
    lock.touch()
    lock.chmod(0o444)
    assert not is_locked(lock)


def test_file_never_replaces_a_folder(tmp_path):
    folder = tmp_path / "report.html"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(IsADirectoryError):
        write_atomic(folder, "text")
    assert (folder / "notes").read_text() == "mine"
