"""Locks of the ground floor."""

import pytest

from common.files import exclusive_lock, is_locked


def test_lock_is_seen_by_readers_and_excludes_others(tmp_path):
    lock = tmp_path / ".lock"
    assert not is_locked(lock) and not lock.exists(), "a probe makes no file"
    with exclusive_lock(lock):
        assert is_locked(lock)
        with pytest.raises(TimeoutError), exclusive_lock(lock, seconds=0):
            pass
    assert not is_locked(lock)
    lock.touch()
    lock.chmod(0o444)
    assert not is_locked(lock)
