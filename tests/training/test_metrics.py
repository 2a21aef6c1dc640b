"""metrics.jsonl while others remove, cut or replace it, and the history from which it is written again."""

import io
import json
import math
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common.errors import RunError
from tests.helpers import compose_config, read_jsonl
from training.monitor.history import History
from training.monitor.metrics import MetricsRecorder
from training.run_dir import RunDir
from zclip import Decision, FixedNorm
from zclip.updates import UpdateMonitor

CONFIG = cache(compose_config)


class Recording:
    """A recorder of a run whose losses are 1, 2, ...; `output` is what it has printed."""

    def __init__(self, folder: Path, history: History | None = None, step: int = 0) -> None:
        self.step = step
        self.file = folder / "metrics.jsonl"
        self.output = io.StringIO()
        console = Console(file=self.output, soft_wrap=True, highlight=False, markup=False)
        self.strategy = FixedNorm(1.0)
        self.recorder = MetricsRecorder(RunDir(folder), CONFIG(), self.strategy, [], console)
        self.recorder.history = history or History()
        self.losses = self.recorder.start(step, torch.device("cpu"), lambda tensor, how: tensor)

    def take(self, steps: int, loss: float | None = None) -> None:
        """Record so many steps, and write them."""
        for _ in range(steps):
            self.step += 1
            parameter = torch.nn.Parameter(torch.ones(2))
            parameter.grad = torch.full((2,), float(self.step))
            self.strategy.step([parameter])
            self.recorder.add_micro_batch(torch.tensor(float(self.step if loss is None else loss)))
            self.recorder.record(self.step, 0.1, {})
        self.recorder.flush()

    def restored(self) -> History:
        """Return the history that a checkpoint of this step would hold."""
        return History(self.recorder.history.state())


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """A recording of three steps."""
    recording = Recording(tmp_path)
    recording.take(3)
    return recording


def removed(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 30)


def lengthened(file: Path) -> None:
    with file.open("a") as opened:
        opened.write("a word\n")


def rotated(file: Path) -> None:
    file.rename(file.with_name("metrics.jsonl.1"))
    file.touch()


def edited(file: Path) -> None:
    file.with_name("new").write_text(file.read_text().replace("1.0", "7.0"))
    file.with_name("new").replace(file)


def moved_and_linked(file: Path) -> None:
    file.rename(file.parent / "elsewhere")
    file.symlink_to("elsewhere")


@pytest.mark.parametrize("change", [removed, emptied, cut, lengthened, rotated, edited, moved_and_linked])
def test_changed_file_is_written_again_and_reported_once(change: Callable[[Path], None], recording):
    before = recording.file.read_bytes()
    change(recording.file)
    recording.take(2)
    recording.take(1)
    assert recording.file.read_bytes().startswith(before) and not recording.file.is_symlink()
    assert [row["loss"] for row in read_jsonl(recording.file)] == [1, 2, 3, 4, 5, 6]
    assert recording.output.getvalue() == f"{recording.file} was changed by another program: it is written again\n"


def test_file_that_is_emptied_during_a_write_is_written_again(recording, monkeypatch):
    fsync = os.fsync

    def empty_and_sync(descriptor: int) -> None:
        os.truncate(recording.file, 0)
        monkeypatch.setattr(os, "fsync", fsync)

    monkeypatch.setattr(os, "fsync", empty_and_sync)
    recording.take(1)
    assert recording.file.read_bytes() == b""
    recording.recorder.finish()
    assert [row["loss"] for row in read_jsonl(recording.file)] == [1, 2, 3, 4]


def test_file_that_is_gone_at_the_end_is_complete_in_the_end(recording):
    before = recording.file.read_bytes()
    recording.file.unlink()
    recording.recorder.finish()
    assert recording.file.read_bytes() == before


def test_file_that_cannot_be_written_is_reported_and_written_later(recording):
    recording.file.unlink()
    recording.file.mkdir()
    (recording.file / "inside").touch()
    recording.take(1)
    recording.take(1)
    with pytest.raises(
        RunError, match=r"metrics\.jsonl cannot be written \(.*directory.*\): the same command continues"
    ):
        recording.recorder.finish()
    shutil.rmtree(recording.file)
    recording.take(1)
    assert [row["loss"] for row in read_jsonl(recording.file)] == [1, 2, 3, 4, 5, 6]
    assert recording.output.getvalue().count("CANNOT BE WRITTEN") == 1


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda lines: [], 3),
        (lambda lines: [lines[0], lines[2]], 1),
        (lambda lines: [lines[0], lines[1], lines[2][:-9]], 1),
        (lambda lines: [b"\0" * 50, *lines[1:]], 1),
        (lambda lines: [b"[" * 100_000, *lines[1:]], 1),
        (lambda lines: [b"[1, 2]", b"\xff", *lines[2:]], 2),
        (lambda lines: [lines[0].replace(b'"loss": 1.0', b'"loss": "x"'), *lines[1:]], 1),
        (lambda lines: [lines[0].replace(b'"loss": 1.0', b'"loss": 1.5'), *lines[1:]], 1),
        (lambda lines: [lines[0].replace(b'"step": 1', b'"step": NaN'), *lines[1:]], 1),
        (lambda lines: [lines[0].replace(b'"clipped": ', b'"clip": '), *lines[1:]], 1),
        (lambda lines: lines[::-1], 0),
        (lambda lines: [*lines, lines[0], b"", b"{}"], 0),
        (lambda lines: [*lines, lines[0].replace(b'"step": 1', b'"step": 4')], 0),
    ],
)
def test_damaged_lines_come_from_the_checkpoint_without_times(damage, lost, recording, tmp_path):
    lines = recording.file.read_bytes().splitlines()
    recording.file.write_bytes(b"\n".join(damage(lines)) + b"\n")
    resumed = Recording(tmp_path, recording.restored(), step=3)
    rows, before = read_jsonl(recording.file), list(map(json.loads, lines))
    assert resumed.losses == [1, 2, 3] and [row["step"] for row in rows] == [1, 2, 3]
    assert sum("peak_memory_gib" not in row or row["peak_memory_gib"] is None for row in rows) == lost
    for row, old in zip(rows, before, strict=True):
        assert {
            name: old[name] for name in ("step", "tokens", "lr", "loss", "grad_norm", "clipped")
        }.items() <= row.items()
    report = f"{lost} of 3 lines of {recording.file} are lost: they are written again, without times\n"
    assert resumed.output.getvalue() == (report if lost else "")
    resumed.take(1)
    assert [row["step"] for row in read_jsonl(recording.file)] == [1, 2, 3, 4]


def test_run_goes_on_without_lines_that_no_checkpoint_has(recording, tmp_path):
    """Checkpoints of earlier versions hold no metrics."""
    lines = recording.file.read_bytes().splitlines(keepends=True)
    recording.file.write_bytes(lines[0] + lines[2])
    resumed = Recording(tmp_path, step=3)
    assert resumed.output.getvalue() == f"1 of 3 lines of {recording.file} are lost: the run goes on without them\n"
    assert resumed.losses == [1, 1, 3], "a lost step counts as the one before it"
    resumed.take(1)
    assert [row["step"] for row in read_jsonl(recording.file)] == [1, 3, 4]
    again = Recording(tmp_path, resumed.restored(), step=4)
    assert again.losses == [1, 1, 3, 4] and [row["step"] for row in read_jsonl(recording.file)] == [1, 3, 4]


def test_lines_after_the_checkpoint_are_dropped(recording, tmp_path):
    state = recording.recorder.history.state()
    resumed = Recording(tmp_path, History({name: column[:2] for name, column in state.items()}), step=2)
    assert resumed.output.getvalue() == "" and [row["step"] for row in read_jsonl(recording.file)] == [1, 2]


@pytest.mark.parametrize("name", ["loss", "data_seconds", "grad_norm"])
def test_telemetry_with_the_name_of_another_number_is_refused(name, recording):
    """Losses and times are the recorder's, and the norm is the strategy's. The step is not recorded."""
    recording.recorder.rule = rule = UpdateMonitor()
    rule.telemetry = {"update_norm": torch.tensor(1.0)}
    recording.take(1)
    rule.telemetry = {name: torch.tensor(1.0)}
    with pytest.raises(RunError, match=rf"^telemetry of UpdateMonitor must not have the name {name}: "):
        recording.take(1)
    assert len(read_jsonl(recording.file)) == 4


@pytest.mark.parametrize("name", ["update_norm", 7])
def test_telemetry_of_a_strategy_with_the_name_of_a_rule_or_none_is_refused(name, recording):
    recording.strategy.decide = lambda norm, state: Decision(norm, state, {name: norm})
    if name == 7:
        recording.take(1)
        assert read_jsonl(recording.file)[3]["7"] == pytest.approx(4 * 2**0.5)
        return
    with pytest.raises(RunError, match=r"^telemetry of FixedNorm must not have the name update_norm: "):
        recording.take(1)


def test_steps_that_are_not_finite_stay_so(recording, tmp_path):
    recording.take(1, loss=math.nan)
    recording.file.unlink()
    resumed = Recording(tmp_path, recording.restored(), step=4)
    assert resumed.losses == [1, 2, 3, None]
    assert read_jsonl(recording.file)[3]["loss"] is None


def test_histories_are_equal_bit_for_bit_where_they_hold_nan(recording):
    recording.take(1, loss=math.nan)
    one, other = recording.recorder.history.state(), recording.restored().state()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not {"peak_memory_gib", "tokens_per_second", "mfu"} & one.keys()
