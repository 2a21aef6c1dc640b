"""Files, locks and texts of the ground floor."""

import time

import pytest
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.errors import UserError
from common.files import is_locked, read_json, remove, write_atomic
from common.text import every, flatten, nearest, overrides_dict, quoted


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


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "file.json"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "\ud800")
    assert file.read_text() == "old"
    write_atomic(file, b"new")
    assert file.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["file.json"]
    remove(file)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove(tmp_path / "folder")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_damaged_json_is_named(text, tmp_path):
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"result\.json is damaged \(.*\): remove it"):
        read_json(file)


@pytest.mark.parametrize("value", ["plain", "it's", "a\\b", "a\\'b", "x=1, [y] {z}", "ends with \\", "\\\\'\\\\x\\\\"])
def test_quoted_text_is_what_hydra_reads(value):
    override = OverridesParser.create().parse_override(f"key={quoted(value)}")
    assert override.value() == value


def test_overrides_and_nested_settings_by_key():
    assert overrides_dict(["lr=1", "+a.b=x=y", "~c"]) == {"lr": "1", "a.b": "x=y", "c": ""}
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    assert nearest("max_stpes", ["max_steps", "seed"]) == "max_steps" and nearest("zzz", ["seed"]) is None


def test_progress_is_due_after_its_time_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    is_due = every(10)
    due = []
    for now[0] in (100, 105, 110.5, 111, 121):
        due.append(is_due())
    assert due == [False, False, True, False, True]
