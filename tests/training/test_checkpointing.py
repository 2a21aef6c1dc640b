"""What is saved, which checkpoints stay, and what happens when they cannot be written."""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY, same, train, train_command
from tests.training.test_run import final, only_run
from tests.training.test_stopping import TWO, start
from training.checkpoint.format import is_valid, step_of, weights
from training.monitor.divergence import MARGIN, WINDOW, DivergenceDetector
from training.runtime.rng import rng_states, set_rng_states

SLOW = partial(pytest.param, marks=pytest.mark.slow)
FSDP = (*TWO, "trainer.strategy=fsdp")


@pytest.fixture(scope="module")
def settings(corpus: Path, cache: Path) -> tuple[str, ...]:
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: it takes Linux, and root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all room on a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            return filler


def checkpoints(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in (only_run(folder) / "checkpoints").iterdir())


@pytest.mark.parametrize("how", ["one", SLOW("one, beside"), SLOW("sharded"), SLOW("sharded, beside")])
def test_training_goes_on_over_a_full_disk(how, settings, small_disk, tmp_path):
    """Until there is room again; and where there is none to the end, the run continues later. The end is the same."""
    given = (*settings, "trainer.checkpoint_every=10", "trainer.log_every=2", "trainer.max_steps=120")
    given += FSDP if "sharded" in how else ()
    given += ("trainer.async_save=true",) if "beside" in how else ()
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(*given, cwd=whole).returncode == 0

    job = start(*given, cwd=small_disk)
    assert job.stdout is not None
    while not list(small_disk.glob("runs/main/*/checkpoints/step-*.ckpt")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.005)
    filler = fill(small_disk)
    for line in job.stdout:
        if "COULD NOT BE SAVED" in line:
            break
    assert "No space left on device" in line and "the last is of step" in line
    there = (only_run(small_disk) / "checkpoints").glob("step-*")
    assert all(is_valid(path) for path in there)
    if how == "one":  # to the end
        said = job.communicate(timeout=120)[1]
        assert job.returncode == 3 and "Traceback" not in said
        assert said.startswith("step 120 is not saved (") and "No space left on device" in said
        filler.unlink()
        done = train(*given, cwd=small_disk)
        assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    else:
        filler.unlink()
        said = job.communicate(timeout=120)[1]
        assert job.returncode == 0, said
    if "sharded" in how:
        ends = [weights(max((only_run(f) / "checkpoints").iterdir())) for f in (whole, small_disk)]
        assert same(*ends)
    else:
        (checkpoint, rows, loss), (other, other_rows, other_loss) = final(whole), final(small_disk)
        assert rows == other_rows and loss == other_loss
        assert same(checkpoint["optimizer_states"], other["optimizer_states"])
    assert [p.name for p in only_run(small_disk).rglob(".saving*")] == []


def test_a_copy_written_beside_training_is_the_checkpoint(settings, tmp_path):
    ends = []
    for number, given in enumerate(((), ("trainer.async_save=true",), FSDP, (*FSDP, "trainer.async_save=true"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        kept = ("trainer.checkpoint_every=8", "trainer.keep_last=9")
        done = train(*settings, *given, *kept, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert checkpoints(folder) == [8, 16, 24, 32, 40]
        ends.append({path.name: weights(path) for path in (only_run(folder) / "checkpoints").iterdir()})
        waited = [json.loads(line)["saving_seconds"] for line in (only_run(folder) / "metrics.jsonl").open()]
        assert [step for step, seconds in enumerate(waited, 1) if seconds] == [9, 17, 25, 33]
    assert same(ends[0], ends[1]) and same(ends[2], ends[3])


def test_which_checkpoints_stay(settings, tmp_path):
    """The last two, those of multiples of 15, and the last from before the run diverged."""
    kept = ("trainer.checkpoint_every=5", "trainer.keep_last=2", "trainer.keep_every=15")
    bad = ("data.corruption.steps=[21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40]", "clip=none")
    given = tuple(s for s in settings if not s.startswith("clip."))
    done = train(*given, *kept, *bad, "lr=1e-2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (only_run(tmp_path) / "metrics.jsonl").open()]
    health = DivergenceDetector()
    for loss in losses:
        health.add(loss)
    healthy = max(step for step in range(5, 41, 5) if health.at(step))
    assert 20 <= healthy < 35
    assert checkpoints(tmp_path) == sorted({15, 30, 35, 40, healthy})


def test_health():
    health = DivergenceDetector()
    for loss in [8.0] * WINDOW + [5.0] * WINDOW:
        health.add(loss)
    assert all(health.at(step) for step in range(1, 2 * WINDOW + 1))
    assert not health.at(0) and not health.at(2 * WINDOW + 1)
    health.add(None)
    assert not health.at(2 * WINDOW + 1)
    for _ in range(WINDOW):
        health.add(5.0 + MARGIN)
    assert not health.at(3 * WINDOW) and health.at(3 * WINDOW + 1), "the step that was not finite is out of sight"
    for _ in range(WINDOW // 2):
        health.add(5.1 + MARGIN)
    assert health.at(3 * WINDOW + 1 + WINDOW // 2 - 1)
    health.add(5.1 + MARGIN)
    assert not health.at(3 * WINDOW + 2 + WINDOW // 2), "more than half of a window lies above"
    health.add(math.nan)
    assert not health.at(3 * WINDOW + 3 + WINDOW // 2)


def test_a_checkpoint_has_what_it_takes(settings, tmp_path):
    assert train(*settings, cwd=tmp_path).returncode == 0
    checkpoint = final(tmp_path)[0]
    assert checkpoint["config"]["lr"] == 3e-3 and checkpoint["config"]["clip"]["name"] == "zclip"
    assert checkpoint["global_step"] == 40
    set_rng_states(checkpoint["random"])
    before = rng_states()
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    set_rng_states(before)
    assert numbers == [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


@pytest.mark.parametrize("before, after, steps", [(8, 2, 15), SLOW(2, 8, 15), SLOW(4, 1, 13)])
def test_a_run_goes_on_from_any_step_with_other_micro_batches(before, after, steps, settings, tmp_path):
    """As on another number of processes, which is another number of micro-batches in a step."""
    for name in ("whole", "changed"):
        (tmp_path / name).mkdir()
    given = (
        *settings,
        "trainer.log_every=1",
        f"trainer.checkpoint_every={steps}",
        "trainer.keep_last=9",
        "name=x",
    )
    done = train(*given, f"trainer.micro_batch_size={before}", cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "changed" / "runs" / "main" / "x"
    shutil.copytree(tmp_path / "whole" / "runs" / "main" / "x", path)
    (path / "result.json").unlink()
    for checkpoint in sorted((path / "checkpoints").iterdir()):
        if step_of(checkpoint) > steps:
            checkpoint.unlink()
    (path / "config.yaml").write_text(
        (path / "config.yaml").read_text().replace(f"micro_batch_size: {before}", f"micro_batch_size: {after}")
    )
    done = train(*given, f"trainer.micro_batch_size={after}", cwd=tmp_path / "changed")
    assert done.returncode == 0 and "COULD NOT" not in done.stdout, done.stdout + done.stderr
    losses = [[row["loss"] for row in final(tmp_path / name)[1]] for name in ("whole", "changed")]
    assert len(losses[0]) == len(losses[1]) == 40 and losses[0][:steps] == losses[1][:steps]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert [step for step in checkpoints(tmp_path / "changed") if step > steps]


def test_words_that_cannot_be_written_are_lost_and_the_run_goes_on(settings, small_disk, tmp_path):
    """Of a run whose output is on the full disk; and of one whose reader goes."""
    given = (*settings, "trainer.checkpoint_every=10", "trainer.max_steps=150", f"paths.runs={small_disk}/runs")
    with (small_disk / "log").open("w") as log:
        job = subprocess.Popen(train_command(*given), cwd=tmp_path, stdout=log, stderr=log)
        while not list(small_disk.glob("runs/main/*/checkpoints/step-*.ckpt")):
            assert job.poll() is None, (small_disk / "log").read_text()
            time.sleep(0.005)
        filler = fill(small_disk)
        time.sleep(1)
        filler.unlink()
        assert job.wait(timeout=120) == 0, (small_disk / "log").read_text()
    job = subprocess.Popen(train_command(*settings, "name=gone"), cwd=tmp_path, stdout=subprocess.PIPE)
    assert job.stdout is not None and job.stdout.readline()
    job.stdout.close()
    assert job.wait(timeout=120) == 0
    assert (tmp_path / "runs" / "main" / "gone" / "result.json").exists()
