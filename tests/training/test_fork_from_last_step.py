"""A fork that begins after the last step of another run: its checkpoints are whole, and it resumes."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import copy_run, interrupted, read_jsonl, train_to_end
from training.checkpoint.state import find_problem
from training.run_dir import RunDir

LAST, STEPS, SAVED = 40, 56, 48


@pytest.fixture(scope="module")
def settings(tiny) -> tuple[str, ...]:
    longer = (f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=8", "trainer.keep_last=9")
    return (*tiny, *longer, f"fork_from=old@{LAST}", "name=new")


@pytest.fixture(scope="module")
def forked(settings, finished_run: Path, once) -> Path:
    """The folder of the fork, which is finished."""

    def fill(folder: Path) -> None:
        copy_run(finished_run, folder).rename(folder / "runs" / "main" / "old")
        train_to_end(*settings, cwd=folder)

    return once("forked-last", fill) / "runs" / "main" / "new"


def test_checkpoints_are_whole(forked):
    run_dir = RunDir(forked)
    assert run_dir.checkpoint_steps() == [SAVED, STEPS]
    for step in run_dir.checkpoint_steps():
        assert find_problem(run_dir.checkpoint(step)) is None
        assert torch.load(run_dir.checkpoint(step), weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("epoch", [0, 1])
def test_interrupted_fork_resumes_to_the_same_bits(epoch, forked, settings, run_in_process, tmp_path):
    """With a checkpoint of an earlier version too, in which Lightning counts another epoch."""
    again = interrupted(forked, tmp_path, SAVED)
    checkpoint = RunDir(again).checkpoint(SAVED)
    if epoch:
        state = torch.load(checkpoint, weights_only=True)
        state["epoch"] = 1
        for counts in state["loops"]["fit_loop"]["epoch_progress"].values():
            counts.update(completed=1, processed=1)
        torch.save(state, checkpoint)
    _, output = run_in_process(*settings)
    assert f"after step {SAVED} of {STEPS}" in output, output
    rows, others = read_jsonl(again / "metrics.jsonl"), read_jsonl(forked / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(row["loss"], row["grad_norm"]) for row in others]
    assert find_problem(RunDir(again).checkpoint(STEPS)) is None


def test_other_epochs_are_those_of_no_run(forked, finished_run, tmp_path):
    for run, step, epoch in ((finished_run, LAST, 1), (forked, STEPS, 2)):
        checkpoint = tmp_path / f"step-{step:08d}.ckpt"
        shutil.copy(RunDir(run).checkpoint(step), checkpoint)
        torch.save(torch.load(checkpoint, weights_only=True) | {"epoch": epoch}, checkpoint)
        assert "its step: Lightning's epoch is not 0" in (find_problem(checkpoint) or "")
