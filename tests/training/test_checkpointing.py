"""What is saved, which checkpoints are kept, and what happens when they cannot be written."""

import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import FSDP, SLOW, TINY, final_state, only_run, read_jsonl, same, start, train, train_command
from training.checkpoint.format import is_valid, load_model_state
from training.checkpoint.manager import rng_states, set_rng_states
from training.monitor.health import LOSS_MARGIN, WINDOW, DivergenceDetector


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
    """Fill a disk with one file, and return it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            return filler


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in (only_run(folder) / "checkpoints").iterdir())


@pytest.mark.parametrize("mode", ["one", SLOW("one, async"), SLOW("sharded"), SLOW("sharded, async")])
def test_training_continues_on_a_full_disk(mode, settings, small_disk, tmp_path):
    """Saving works once there is space again. If there is none until the last step, the run resumes later."""
    overrides = (*settings, "trainer.checkpoint_every=10", "trainer.log_every=2", "trainer.max_steps=120")
    overrides += FSDP if "sharded" in mode else ()
    overrides += ("trainer.async_save=true",) if "async" in mode else ()
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    assert train(*overrides, cwd=uninterrupted).returncode == 0

    job = start(*overrides, cwd=small_disk)
    while not list(small_disk.glob("runs/main/*/checkpoints/step-*.ckpt")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.005)
    filler = fill(small_disk)
    for line in job.lines():
        if "COULD NOT BE SAVED" in line:
            break
    assert "No space left on device" in line and "the last is of step" in line
    saved = (only_run(small_disk) / "checkpoints").glob("step-*")
    assert all(is_valid(path) for path in saved)
    if mode == "one":  # full until the last step
        err = job.communicate(timeout=120)[1]
        assert job.returncode == 3 and "Traceback" not in err
        assert err.startswith("step 120 is not saved (") and "No space left on device" in err
        filler.unlink()
        done = train(*overrides, cwd=small_disk)
        assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    else:
        filler.unlink()
        err = job.communicate(timeout=120)[1]
        assert job.returncode == 0, err
    if "sharded" in mode:
        ends = [load_model_state(max((only_run(f) / "checkpoints").iterdir())) for f in (uninterrupted, small_disk)]
        assert same(*ends)
    else:
        (checkpoint, rows, loss), (other, other_rows, other_loss) = final_state(uninterrupted), final_state(small_disk)
        assert rows == other_rows and loss == other_loss
        assert same(checkpoint["optimizer_states"], other["optimizer_states"])
    assert [p.name for p in only_run(small_disk).rglob(".saving*")] == []


def test_async_save_writes_the_same_checkpoints(settings, tmp_path):
    ends = []
    for number, mode in enumerate(((), ("trainer.async_save=true",), FSDP, (*FSDP, "trainer.async_save=true"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        kept = ("trainer.checkpoint_every=8", "trainer.keep_last=9")
        done = train(*settings, *mode, *kept, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert checkpoint_steps(folder) == [8, 16, 24, 32, 40]
        ends.append({path.name: load_model_state(path) for path in (only_run(folder) / "checkpoints").iterdir()})
        waited = [row["saving_seconds"] for row in read_jsonl(only_run(folder) / "metrics.jsonl")]
        assert [step for step, seconds in enumerate(waited, 1) if seconds] == [9, 17, 25, 33]
    assert same(ends[0], ends[1]) and same(ends[2], ends[3])


def test_kept_checkpoints(settings, tmp_path):
    """The last two are kept, those at multiples of 15, and the last one from before the run diverged."""
    kept = ("trainer.checkpoint_every=5", "trainer.keep_last=2", "trainer.keep_every=15")
    corruption = ("data.corruption.steps=[21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40]", "clip=none")
    settings = tuple(s for s in settings if not s.startswith("clip."))
    done = train(*settings, *kept, *corruption, "lr=1e-2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    detector = DivergenceDetector()
    for row in read_jsonl(only_run(tmp_path) / "metrics.jsonl"):
        detector.add(row["loss"])
    healthy = max(step for step in range(5, 41, 5) if detector.is_healthy(step))
    assert 20 <= healthy < 35
    assert checkpoint_steps(tmp_path) == sorted({15, 30, 35, 40, healthy})


def test_divergence_detector_compares_medians_of_windows():
    detector = DivergenceDetector()
    for loss in [8.0] * WINDOW + [5.0] * WINDOW:
        detector.add(loss)
    assert all(detector.is_healthy(step) for step in range(1, 2 * WINDOW + 1))
    assert not detector.is_healthy(0) and not detector.is_healthy(2 * WINDOW + 1)
    detector.add(None)
    assert not detector.is_healthy(2 * WINDOW + 1)
    for _ in range(WINDOW):
        detector.add(5.0 + LOSS_MARGIN)
    assert not detector.is_healthy(3 * WINDOW) and detector.is_healthy(3 * WINDOW + 1), "it left the window"
    for _ in range(WINDOW // 2):
        detector.add(5.1 + LOSS_MARGIN)
    assert detector.is_healthy(3 * WINDOW + 1 + WINDOW // 2 - 1)
    detector.add(5.1 + LOSS_MARGIN)
    assert not detector.is_healthy(3 * WINDOW + 2 + WINDOW // 2), "more than half of the window is above the margin"
    detector.add(math.nan)
    assert not detector.is_healthy(3 * WINDOW + 3 + WINDOW // 2)


def test_checkpoint_holds_configuration_and_random_states(settings, tmp_path):
    assert train(*settings, cwd=tmp_path).returncode == 0
    checkpoint = final_state(tmp_path)[0]
    assert checkpoint["config"]["lr"] == 3e-3 and checkpoint["config"]["clip"]["name"] == "zclip"
    assert checkpoint["global_step"] == 40
    set_rng_states(checkpoint["random"])
    before = rng_states()
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    set_rng_states(before)
    assert numbers == [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


@pytest.mark.parametrize("before, after, steps", [(8, 2, 15), SLOW(2, 8, 15), SLOW(4, 1, 13)])
def test_run_resumes_from_any_step_with_another_micro_batch_size(before, after, steps, settings, tmp_path):
    """Another number of processes is the same: another number of micro-batches in a step."""
    for name in ("uninterrupted", "changed"):
        (tmp_path / name).mkdir()
    overrides = (
        *settings,
        "trainer.log_every=1",
        f"trainer.checkpoint_every={steps}",
        "trainer.keep_last=9",
        "name=x",
    )
    done = train(*overrides, f"trainer.micro_batch_size={before}", cwd=tmp_path / "uninterrupted")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "changed" / "runs" / "main" / "x"
    shutil.copytree(tmp_path / "uninterrupted" / "runs" / "main" / "x", path)
    (path / "result.json").unlink()
    for checkpoint in sorted((path / "checkpoints").iterdir()):
        if step_of(checkpoint) > steps:
            checkpoint.unlink()
    (path / "config.yaml").write_text(
        (path / "config.yaml").read_text().replace(f"micro_batch_size: {before}", f"micro_batch_size: {after}")
    )
    done = train(*overrides, f"trainer.micro_batch_size={after}", cwd=tmp_path / "changed")
    assert done.returncode == 0 and "COULD NOT" not in done.stdout, done.stdout + done.stderr
    losses = [[row["loss"] for row in final_state(tmp_path / name)[1]] for name in ("uninterrupted", "changed")]
    assert len(losses[0]) == len(losses[1]) == 40 and losses[0][:steps] == losses[1][:steps]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert [step for step in checkpoint_steps(tmp_path / "changed") if step > steps]


def test_stdout_errors_do_not_stop_training(settings, small_disk, tmp_path):
    """Neither a full disk under the output nor a closed pipe stops a run."""
    overrides = (*settings, "trainer.checkpoint_every=10", "trainer.max_steps=150", f"paths.runs={small_disk}/runs")
    with (small_disk / "log").open("w") as log:
        job = subprocess.Popen(train_command(*overrides), cwd=tmp_path, stdout=log, stderr=log)
        while not list(small_disk.glob("runs/main/*/checkpoints/step-*.ckpt")):
            assert job.poll() is None, (small_disk / "log").read_text()
            time.sleep(0.005)
        filler = fill(small_disk)
        time.sleep(1)
        filler.unlink()
        assert job.wait(timeout=120) == 0, (small_disk / "log").read_text()
    job = subprocess.Popen(train_command(*settings, "name=closed"), cwd=tmp_path, stdout=subprocess.PIPE)
    assert job.stdout is not None and job.stdout.readline()
    job.stdout.close()
    assert job.wait(timeout=120) == 0
    assert (tmp_path / "runs" / "main" / "closed" / "result.json").exists()
