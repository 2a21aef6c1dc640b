"""What others do to the folder of a run while it trains, for `interrupt_runs`.

Each disturbance happens once, in the middle of a run. The run must end as an undisturbed one, or with one sentence,
after which the same command, once the cause is gone, ends as an undisturbed one.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from tests.faults.runs import STEPS, Run
from tests.helpers import read_only

#: Step from which a run is disturbed.
MIDDLE = STEPS // 2


class Disturbance(NamedTuple):
    """What is done to a run in its middle, and how the run then ends."""

    name: str
    disturb: Callable[[Run], object]
    modes: tuple[str, ...] = ("one",)
    killed: bool = False  # whether the run is killed right after it


def remove_checkpoints(run: Run) -> None:
    """Remove the folder of the checkpoints."""
    shutil.rmtree(run.run_dir.checkpoints)


def move_checkpoints(run: Run) -> None:
    """Move the folder of the checkpoints out of the run folder."""
    run.run_dir.checkpoints.rename(run.outside / "moved")


def move_and_link_checkpoints(run: Run) -> None:
    """Move the folder of the checkpoints, and leave a link to it."""
    move_checkpoints(run)
    run.run_dir.checkpoints.symlink_to(run.outside / "moved")


def link_checkpoint(run: Run) -> None:
    """Move the newest checkpoint, and leave a link to it."""
    newest = run.run_dir.checkpoint(run.run_dir.checkpoint_steps()[-1])
    newest.rename(run.outside / newest.name)
    newest.symlink_to(run.outside / newest.name)


def remove_metrics(run: Run) -> None:
    """Remove metrics.jsonl."""
    run.run_dir.metrics_file.unlink()


def empty_metrics(run: Run) -> None:
    """Empty metrics.jsonl, as `: > metrics.jsonl` does."""
    os.truncate(run.run_dir.metrics_file, 0)


def cut_metrics(run: Run) -> None:
    """Cut metrics.jsonl in the middle of a line."""
    os.truncate(run.run_dir.metrics_file, run.run_dir.metrics_file.stat().st_size // 2)


def rotate_metrics(run: Run) -> None:
    """Rename metrics.jsonl and make a new one, as logrotate does."""
    run.run_dir.metrics_file.rename(run.outside / "metrics.jsonl.1")
    run.run_dir.metrics_file.touch()


def start_a_second_time(run: Run) -> None:
    """Start the same command again, which must be refused in one sentence. The first is stopped meanwhile."""
    run.process.send_signal(signal.SIGSTOP)  # it must not end before the second has begun
    try:
        second = subprocess.run(run.command, cwd=run.folder, capture_output=True, text=True)
    finally:
        run.process.send_signal(signal.SIGCONT)
    if second.returncode != 2 or "another process is training" not in second.stderr:
        raise RuntimeError(f"the second start ended with status {second.returncode}: {second.stderr}")


DISTURBANCES = (
    Disturbance("checkpoints/ is removed", remove_checkpoints, ("one", "two")),
    Disturbance("checkpoints/ is removed, kill -9", remove_checkpoints, killed=True),
    Disturbance("checkpoints/ is moved away", move_checkpoints),
    Disturbance("checkpoints/ is moved and linked", move_and_link_checkpoints),
    Disturbance("a checkpoint is moved and linked", link_checkpoint, ("one", "two")),
    Disturbance("a checkpoint is moved and linked, kill -9", link_checkpoint, killed=True),
    Disturbance("metrics.jsonl is removed", remove_metrics, ("one", "two")),
    Disturbance("metrics.jsonl is removed, kill -9", remove_metrics, killed=True),
    Disturbance("metrics.jsonl is emptied", empty_metrics),
    Disturbance("metrics.jsonl is cut, kill -9", cut_metrics, killed=True),
    Disturbance("metrics.jsonl is rotated", rotate_metrics),
    Disturbance("a second process is started", start_a_second_time),
)


def disturb(run: Run, disturbance: Disturbance) -> str:
    """Disturb a run in its middle, and return how it ended; it is started again if it was killed."""
    process = run.start()
    while run.steps() < MIDDLE or not run.run_dir.checkpoint_steps():
        if process.poll() is not None:
            raise RuntimeError(run.log())
        time.sleep(0.0005)
    disturbance.disturb(run)
    if disturbance.killed:
        process.kill()
    status = process.wait(timeout=180)
    if disturbance.killed:
        run.finish()
        return f"status {status}, then 0"
    if status:
        raise RuntimeError(run.log())
    return "status 0"


def fill_disk(run: Run) -> str:
    """Run on a disk that is too small for a checkpoint, and again when it is not; return how that ended.

    Where nothing can be mounted, files are limited to 1 MB instead.
    """
    disk = run.folder / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    try:
        status = run.start(-1 if mounted else 1_000_000).wait(timeout=180)
        reason, sentence = "No space left on device" if mounted else "File too large", run.log().splitlines()[-1]
        if status != 3 or not sentence.startswith(f"step {STEPS} is not saved (") or reason not in sentence:
            raise RuntimeError(run.log())
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        run.finish()
        if mounted:
            shutil.copytree(disk, run.outside / "runs", symlinks=True)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    if mounted:
        disk.rmdir()
        (run.outside / "runs").rename(disk)
    return f"status 3 ({reason}), then 0"


def write_protect(run: Run) -> str:
    """Make the folder of the checkpoints read-only in the middle of a run, and writable for the next start."""
    folder = run.run_dir.checkpoints
    process = run.start()
    while run.steps() < MIDDLE or not run.run_dir.checkpoint_steps():
        if process.poll() is not None:
            raise RuntimeError(run.log())
        time.sleep(0.0005)
    try:
        with read_only(folder):
            status = process.wait(timeout=180)
    finally:
        process.kill()
    sentence = run.log().splitlines()[-1]
    if status != 3 or f"step {STEPS} is not saved" not in sentence or "continues after step" not in sentence:
        raise RuntimeError(run.log())
    run.finish()
    return "status 3 (the last checkpoint is named), then 0"


def disturbances() -> Iterator[tuple[str, str, Callable[[Run], str]]]:
    """Yield each disturbance with the run's mode, and the function that disturbs a run and returns how it ended."""
    for disturbance in DISTURBANCES:
        for mode in disturbance.modes:
            yield disturbance.name, mode, partial(disturb, disturbance=disturbance)
    yield "the disk is full", "one", fill_disk
    yield "checkpoints/ is made read-only", "one", write_protect
