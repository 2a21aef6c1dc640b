"""Files, locks and texts of the ground floor."""

import os
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.console import make_console
from common.errors import UserError
from common.files import commit, hold_lock, is_locked, make_dir, open_append, remove, remove_leftovers, write_atomic
from common.reading import parse_yaml, read_json, read_lines
from common.run_files import Environment
from common.text import every, flatten, nearest, overrides_dict, quoted


def test_lock_is_seen_by_readers_and_excludes_others(tmp_path):
    lock = tmp_path / ".lock"
    assert not is_locked(lock) and not lock.exists(), "a probe makes no file"
    with hold_lock(lock):
        assert is_locked(lock)
        with pytest.raises(TimeoutError), hold_lock(lock, 0):
            pass
    assert not is_locked(lock)
    lock.touch()
    lock.chmod(0o444)
    assert not is_locked(lock)


def test_file_never_replaces_a_folder(tmp_path):
    folder = tmp_path / "report.html"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(IsADirectoryError, match=r"Is a directory: .*report\.html"):
        write_atomic(folder, "text")
    with pytest.raises(UserError, match=r"report\.html is a folder"), hold_lock(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
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


def test_writing_follows_no_link(tmp_path):
    precious, inside = tmp_path / "precious", tmp_path / "run"
    precious.mkdir()
    inside.mkdir()
    (precious / "file").write_text("mine")
    for name in ("result.json", "metrics.jsonl", ".lock"):
        (inside / name).symlink_to(precious / "file")
    (inside / "checkpoints").symlink_to(precious)
    (inside / ".saving-old-result.json").symlink_to(precious / "file")
    (inside / "step-8.ckpt").symlink_to(precious)
    (inside / "new").mkdir()

    write_atomic(inside / "result.json", "new")
    assert (inside / "result.json").read_text() == "new" and not (inside / "result.json").is_symlink()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        open_append(inside / "metrics.jsonl")
    with pytest.raises(UserError, match=r"\.lock is a link"), hold_lock(inside / ".lock", 0):
        pass
    with pytest.raises(UserError, match="checkpoints is a link"):
        make_dir(inside / "checkpoints")
    remove_leftovers(inside)
    commit(inside / "new", inside / "step-8.ckpt")
    remove(inside / "checkpoints")
    assert sorted(path.name for path in inside.iterdir()) == [".lock", "metrics.jsonl", "result.json", "step-8.ckpt"]
    assert [path.read_text() for path in precious.iterdir()] == ["mine"]


def test_folder_is_made_once_and_never_in_place_of_a_file(tmp_path):
    for _ in range(2):
        make_dir(tmp_path / "checkpoints")
    (tmp_path / "plots").touch()
    with pytest.raises(UserError, match="plots is not a folder"):
        make_dir(tmp_path / "plots")


def test_hard_linked_file_is_not_appended_to(tmp_path):
    (tmp_path / "copy").write_text("1\n")
    (tmp_path / "lines").hardlink_to(tmp_path / "copy")
    with open_append(tmp_path / "lines") as file:
        file.write(b"2\n")
    assert (tmp_path / "lines").read_text() == "1\n2\n" and (tmp_path / "copy").read_text() == "1\n"


def test_leftovers_of_killed_writers_are_removed_and_no_others(tmp_path):
    (tmp_path / ".saving-0123-scores.json").write_text("half")
    with hold_lock(tmp_path / ".saving-4567-scores.json"):
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".saving-4567-scores.json"]


def test_lock_file_keeps_its_content(tmp_path):
    (tmp_path / "lock").write_text("mine")
    with hold_lock(tmp_path / "lock", 0), pytest.raises(TimeoutError), hold_lock(tmp_path / "lock", 0):
        pass
    assert (tmp_path / "lock").read_text() == "mine"


def test_lock_that_has_two_names_is_refused(tmp_path):
    """Whoever holds it by one name would wait for itself by the other."""
    (tmp_path / "lock").touch()
    (tmp_path / "other").hardlink_to(tmp_path / "lock")
    with (
        pytest.raises(UserError, match=r"lock has other names too: a lock must have one"),
        hold_lock(tmp_path / "lock"),
    ):
        pass


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "3", "[" * 100_000, '{"starts": {}}', '{"starts": [[1, 2]]}', '{"starts": [{"step": "8"}]}',
     '{"starts": [{"step": 1.5}]}', '{"starts": [{"device": "\\ud800"}]}', "9" * 5000, "\xff"],
)  # fmt: skip
def test_damaged_json_is_named(content, tmp_path):
    file = tmp_path / "environment.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"environment\.json is damaged \(.*\): remove it") as error:
        read_json(file, Environment)
    assert len(str(error.value)) < 500


def test_file_that_must_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "file.json").touch(mode=0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    os.seteuid(user or 65534)  # the user nobody: permissions do not bind root
    try:
        with pytest.raises(UserError, match=r"^file\.json cannot be read \(Permission denied\)$"):
            read_json(Path("file.json"), Environment)
    finally:
        os.seteuid(user)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=f"{path} is damaged"):
            read_json(path, Environment)
    with pytest.raises(OSError, match="fifo"):
        open_append(tmp_path / "fifo")


def test_long_lines_are_cut_and_the_next_are_whole(tmp_path):
    (tmp_path / "lines").write_bytes(b"a" * (3 << 20) + b"\n" + b"b" * (1 << 20) + b"\nc\n\nd")
    assert [(line[:1], len(line)) for line in read_lines(tmp_path / "lines")] == [
        (b"a", 1 << 20), (b"b", 1 << 20), (b"c", 1), (b"", 0), (b"d", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [1]\nb: *a",
        "[" * 1500,
        "a: !!python/object/apply:os.getcwd []",
        "a: [",
        "!!int ''",
        "!!bool x",
        "\0",
        "a: 1:30:30",
    ],
)
def test_yaml_is_plain_or_refused(content):
    with pytest.raises(ValueError, match=r"\w"):
        parse_yaml(content)


def test_printed_text_is_text(capsys):
    console = make_console()
    console.print("runs/[bold]x[/b] :smile: \x1b[2J \ud800 \u202e\u061c", style="bold")
    assert capsys.readouterr().out == "runs/[bold]x[/b] :smile: \\x1b[2J \\ud800 \\u202e\\u061c\n"


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
