"""What is saved, which checkpoints are kept, and what happens when they cannot be written."""

import io
import math
import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from common.errors import RunError
from tests.helpers import (
    CHECKOUT,
    FSDP,
    SLOW,
    compose_config,
    copy_run,
    final_state,
    only_run,
    read_jsonl,
    same,
    start,
    train,
)
from tests.training.process_control import Gates, Ranks
from training.checkpoint.format import CHECKSUM, is_valid, load_model_state, publish, saved_config
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.resume import prepare_start
from training.checkpoint.rng import rng_states, set_rng_states
from training.config.compose import read_config
from training.config.identity import differences, run_path
from training.config.schema import Config
from training.monitor.health import LOSS_MARGIN, WINDOW, DivergenceDetector
from training.run_dir import RunDir

#: Bytes that a file on that disk takes at once; it can be written further until they are used.
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: it takes Linux, and root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


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
def test_training_continues_on_a_full_disk(mode, tiny, small_disk, tmp_path, request):
    """Saving works once there is space again. If there is none until the last step, the run resumes later."""
    sharded = "sharded" in mode
    uninterrupted = request.getfixturevalue("sharded_run" if sharded else "finished_run").parents[2]
    gates = Gates(tmp_path / "gates", 12, 32)
    overrides = (*tiny, *gates.overrides, "trainer.checkpoint_every=10", "trainer.log_every=2")
    overrides += FSDP if sharded else ()
    overrides += ("trainer.async_save=true",) if "async" in mode else ()
    run = Ranks(*overrides, cwd=small_disk, **gates.env) if sharded else None
    job = run.jobs[0] if run else start(*overrides, cwd=small_disk, **gates.env)
    gates.wait(12, job)
    while not list(small_disk.glob("runs/main/*/checkpoints/step-*10.ckpt")):  # an asynchronous save takes a moment
        assert job.poll() is None, job.communicate()
        time.sleep(0.005)
    filler = fill(small_disk)
    gates.open(12)
    for line in job.lines():
        if "COULD NOT BE SAVED" in line:
            break
    assert "No space left on device" in line and "the last is of step 10" in line, line
    saved = (only_run(small_disk) / "checkpoints").glob("step-*")
    assert all(is_valid(path) for path in saved)
    if mode != "one":
        filler.unlink()
    gates.open(32)
    err = job.communicate(timeout=120)[1]
    if mode == "one":  # full until the last step
        assert job.returncode == 3 and "Traceback" not in err, err
        assert err.startswith("step 40 is not saved (") and "No space left on device" in err
        filler.unlink()
        done = train(*overrides, cwd=small_disk, env=gates.env)
        assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    else:
        assert job.returncode == 0, err
        assert run is None or run.wait() == [0, 0], run.errors()
    if sharded:
        ends = [load_model_state(max((only_run(f) / "checkpoints").iterdir())) for f in (uninterrupted, small_disk)]
        assert same(*ends)
    else:
        (checkpoint, rows, loss), (other, other_rows, other_loss) = final_state(uninterrupted), final_state(small_disk)
        assert rows == other_rows and loss == other_loss
        assert same(checkpoint["optimizer_states"], other["optimizer_states"])
    assert [p.name for p in only_run(small_disk).rglob(".saving*")] == []


@pytest.mark.parametrize("mode", ["one", SLOW("sharded")])
def test_async_save_writes_the_same_checkpoints(mode, tiny, tmp_path, request):
    sharded = mode == "sharded"
    settings = (*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9", "trainer.async_save=true")
    done = train(*settings, *(FSDP if sharded else ()), cwd=tmp_path, processes=2 if sharded else 1)
    assert done.returncode == 0, done.stderr
    ends = []
    for run in (only_run(tmp_path), request.getfixturevalue("sharded_run" if sharded else "finished_run")):
        checkpoints = sorted((run / "checkpoints").iterdir())
        assert [step_of(path) for path in checkpoints] == [8, 16, 24, 32, 40]
        ends.append({path.name: load_model_state(path) for path in checkpoints})
        waited = [row["saving_seconds"] for row in read_jsonl(run / "metrics.jsonl")]
        assert [step for step, seconds in enumerate(waited, 1) if seconds] == [9, 17, 25, 33]
    assert same(*ends)


def test_kept_checkpoints(tiny, tmp_path):
    """The last two are kept, those at multiples of 15, and the last one from before the run diverged."""
    kept = ("trainer.checkpoint_every=5", "trainer.keep_last=2", "trainer.keep_every=15")
    corruption = ("data.corruption.steps=[21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40]", "clip=none")
    settings = tuple(s for s in tiny if not s.startswith("clip."))
    done = train(*settings, *kept, *corruption, "lr=1e-2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    detector = DivergenceDetector()
    for row in read_jsonl(only_run(tmp_path) / "metrics.jsonl"):
        detector.add(row["loss"])
    healthy = max(step for step in range(5, 41, 5) if detector.is_healthy(step))
    assert 20 <= healthy < 35
    assert checkpoint_steps(tmp_path) == sorted({15, 30, 35, 40, healthy})


class Saving:
    """A manager of a run folder without a run; the checkpoint of each step is the folder's own number."""

    def __init__(self, folder: Path, *settings: str, healthy: int = 0) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.checkpoints.mkdir()
        self.output = io.StringIO()
        console = Console(file=self.output, soft_wrap=True, highlight=False, markup=False)
        config = compose_config("trainer.checkpoint_every=10", "trainer.keep_last=1", *settings)
        self.manager = CheckpointManager(self.run_dir, config, lambda step: step <= healthy, console)

    def save(self, step: int) -> None:
        self.manager.save(step, lambda: {"step": step})


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    """A manager that has saved step 10."""
    (tmp_path / "run").mkdir()
    saving = Saving(tmp_path / "run")
    saving.save(10)
    return saving


def test_newest_healthy_checkpoints_of_any_and_of_a_regular_step_are_kept(tmp_path):
    """The run was stopped after step 13, and diverged after it. A checkpoint of a later step was skipped as damaged."""
    saving = Saving(tmp_path, healthy=13)
    for step in (5, 10, 13, 20, 40):
        saving.run_dir.checkpoint(step).touch()
    saving.save(30)
    assert saving.run_dir.checkpoint_steps() == [10, 13, 30, 40]


def test_folder_that_was_removed_is_made_again(saving):
    folder = saving.run_dir.checkpoints
    shutil.rmtree(folder)
    saving.save(20)
    assert saving.run_dir.checkpoint_steps() == [20] and is_valid(saving.run_dir.checkpoint(20))
    saving.save(30)
    assert saving.output.getvalue() == f"{folder} was removed or moved: it is made again\n"
    saving.manager.finish()


@pytest.mark.parametrize("target", ["there", "gone"])
def test_folder_that_was_moved_and_linked_is_made_again(target, saving, tmp_path):
    folder = saving.run_dir.checkpoints
    moved = folder.rename(tmp_path / "moved")
    folder.symlink_to(moved if target == "there" else tmp_path / "gone")
    saving.save(20)
    assert not folder.is_symlink() and saving.run_dir.checkpoint_steps() == [20]
    assert [path.name for path in moved.iterdir()] == ["step-00000010.ckpt"], "what was moved is left alone"


def test_messages_name_only_checkpoints_that_are_there(saving):
    folder = saving.run_dir.checkpoints
    folder.rename(folder.with_name("moved"))
    folder.touch()  # nothing can be written there
    saving.save(20)
    assert "STEP 20 COULD NOT BE SAVED: [Errno 17] File exists" in saving.output.getvalue()
    assert saving.output.getvalue().endswith("Training continues; there is none yet.\n")
    with pytest.raises(RunError, match=r"^step 20 is not saved \(.*File exists.*\): the same command starts again$"):
        saving.manager.finish()
    folder.unlink()
    folder.with_name("moved").rename(folder)
    with pytest.raises(RunError, match=r"the same command continues after step 10$"):
        saving.manager.finish()


@pytest.mark.parametrize("kind", ["file", "folder", "gone"])
def test_linked_checkpoint_is_replaced_and_removed_as_a_link(kind, saving, tmp_path):
    """Both when it is an old one, and when the same step is saved again."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").touch()
    (tmp_path / "file").touch()
    saving.run_dir.checkpoint(5).symlink_to(tmp_path / kind)
    saving.run_dir.checkpoint(20).symlink_to(tmp_path / kind)
    saving.save(20)
    assert saving.run_dir.checkpoint_steps() == [20] and is_valid(saving.run_dir.checkpoint(20))
    assert (tmp_path / "folder" / "inside").exists() and (tmp_path / "file").read_bytes() == b""
    assert saving.output.getvalue() == "" and len(list(saving.run_dir.checkpoints.iterdir())) == 1


def test_files_of_other_names_are_no_checkpoints(saving):
    others = ("8.ckpt", "²²²²²²²².ckpt", "x.ckpt", ".ckpt", "00000012.ckpt.bak", "-00000012.ckpt", "+0000012.ckpt")
    for name in (f"step-{other}" for other in others):
        (saving.run_dir.checkpoints / name).touch()
    assert saving.run_dir.checkpoint_steps() == [10]
    shutil.rmtree(saving.run_dir.checkpoints)
    assert saving.run_dir.checkpoint_steps() == []


def test_leftovers_of_killed_saves_are_removed_links_among_them(finished_run, tmp_path):
    run_dir = RunDir(copy_run(finished_run, tmp_path))
    steps = run_dir.checkpoint_steps()
    (tmp_path / "kept").mkdir()
    for name in (
        ".removing-step-00000008.ckpt",
        ".removing-0123-step-00000008.ckpt",
        ".saving-4567-step-00000048.ckpt",
    ):
        (run_dir.checkpoints / name).symlink_to(tmp_path / "kept")
    (run_dir.checkpoints / ".saving-89ab-step-00000048.ckpt").mkdir()
    (run_dir.checkpoints / ".saving-cdef-step-00000048.ckpt").touch()
    assert prepare_start(run_dir, None, print).step == 40
    assert len(list(run_dir.checkpoints.iterdir())) == len(steps) and (tmp_path / "kept").exists()


@pytest.mark.parametrize("size", [None, 1000], ids=["elsewhere", "cut"])
def test_checkpoint_without_the_shard_of_another_process_is_not_published(size, sharded_run, tmp_path):
    """Machines that do not share the run folder write each to their own."""
    temporary, final = tmp_path / ".saving-step-00000008.ckpt", tmp_path / "step-00000008.ckpt"
    shutil.copytree(sharded_run / "checkpoints" / final.name, temporary)
    (temporary / CHECKSUM).unlink()
    shard = temporary / "__1_0.distcp"
    shard.unlink() if size is None else os.truncate(shard, size)
    with pytest.raises(RunError, match=r"^__1_0\.distcp, .* all processes must see the same run folder"):
        publish(temporary, final)
    assert not final.exists()


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


def test_checkpoint_holds_configuration_and_random_states(finished_run):
    checkpoint = final_state(finished_run.parents[2])[0]
    assert checkpoint["config"]["lr"] == 3e-3 and checkpoint["config"]["clip"]["name"] == "zclip"
    assert checkpoint["global_step"] == 40
    set_rng_states(checkpoint["random"])
    before = rng_states()
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    set_rng_states(before)
    assert numbers == [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


@pytest.mark.parametrize("run", ["finished_run", "sharded_run"])
def test_configuration_is_read_from_a_checkpoint_alone(run, request, tmp_path):
    path = request.getfixturevalue(run)
    checkpoint = RunDir(path).checkpoint(40)
    config = Config.model_validate(saved_config(checkpoint))
    assert differences(config, read_config(RunDir(path).config_file)) == {}
    assert config.trainer.sharded == (run == "sharded_run")
    (tmp_path / "file").write_bytes(b"no checkpoint")
    (tmp_path / "folder").mkdir()
    torch.save({"config": ["a list"]}, tmp_path / "list")
    assert [saved_config(tmp_path / name) for name in ("file", "folder", "list", "missing")] == [None] * 4


@pytest.mark.parametrize("before, after, steps", [(8, 2, 16), SLOW(2, 8, 15), SLOW(4, 1, 13)])
def test_run_resumes_from_any_step_with_another_micro_batch_size(before, after, steps, tiny, finished_run, tmp_path):
    """Another number of processes is the same: another number of micro-batches in a step."""
    overrides = (*tiny, "trainer.log_every=1", f"trainer.checkpoint_every={steps}", "trainer.keep_last=9")
    if before == 8:
        uninterrupted = finished_run
    else:
        (tmp_path / "uninterrupted").mkdir()
        done = train(*overrides, f"trainer.micro_batch_size={before}", cwd=tmp_path / "uninterrupted")
        assert done.returncode == 0, done.stderr
        uninterrupted = only_run(tmp_path / "uninterrupted")
    overrides += (f"trainer.micro_batch_size={after}",)
    changed = tmp_path / "changed"
    changed.mkdir()
    path = shutil.copytree(uninterrupted, changed / run_path(compose_config(*overrides)))
    (path / "result.json").unlink()
    (path / "config.yaml").unlink()  # it is made again
    for checkpoint in (path / "checkpoints").iterdir():
        state = torch.load(checkpoint, weights_only=True)
        state["config"]["trainer"]["micro_batch_size"] = after
        torch.save(state, checkpoint)
        if step_of(checkpoint) > steps:
            checkpoint.unlink()
    done = train(*overrides, cwd=changed)
    assert done.returncode == 0 and "COULD NOT" not in done.stdout, done.stdout + done.stderr
    assert f"after step {steps} of 40" in done.stdout, done.stdout
    losses = [[row["loss"] for row in final_state(run.parents[2])[1]] for run in (uninterrupted, path)]
    assert len(losses[0]) == len(losses[1]) == 40 and losses[0][:steps] == losses[1][:steps]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert [step for step in checkpoint_steps(changed) if step > steps]


#: train.py with its output in a file, or in a pipe whose reader ends after the first line.
REDIRECTED = """
import os
import runpy
import sys

path, sys.argv = sys.argv[1], sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
output = os.open(path, os.O_WRONLY | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_stdout_errors_do_not_stop_training(tiny, small_disk, tmp_path):
    """Neither a full disk under the output nor a closed pipe stops a run."""
    (tmp_path / "redirected.py").write_text(REDIRECTED)
    gates = Gates(tmp_path / "gates", 12, 35)
    settings = (str(CHECKOUT / "train.py"), *tiny, *gates.overrides, "trainer.log_every=2")
    log, program = small_disk / "log", str(tmp_path / "redirected.py")
    log.touch()
    job = start(str(log), *settings, f"paths.runs={small_disk}/runs", cwd=tmp_path, program=program, **gates.env)
    gates.wait(12, job)
    with log.open("ab") as file:
        file.write(b"\n" * (PAGE - log.stat().st_size % PAGE))
    filler = fill(small_disk)
    written = log.stat().st_size
    gates.open(12)
    gates.wait(35, job)
    assert log.stat().st_size == written, "nothing can be written"
    filler.unlink()
    gates.open(35)
    assert job.wait(timeout=120) == 0, log.read_text()
    assert log.stat().st_size > written and list(small_disk.glob("runs/main/*/result.json"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    job = start(str(pipe), *settings, "name=closed", cwd=tmp_path, program=program, **gates.env)
    while not select.select([reader], [], [], 0.05)[0]:
        assert job.poll() is None, job.output()
    os.close(reader)
    assert job.wait(timeout=120) == 0
    assert (tmp_path / "runs" / "main" / "closed" / "result.json").exists()
