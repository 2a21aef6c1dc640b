"""Which checkpoint a run continues from, and how a run folder is taken back to an earlier one."""

from collections.abc import Callable
from pathlib import Path

from common.errors import RunError
from common.files import remove, write_atomic
from training.checkpoint.format import is_valid, step_of
from training.run_dir import RunDir


def newest_checkpoint(run_dir: RunDir, report: Callable[[str], None]) -> Path | None:
    """Return the newest valid checkpoint; `None` if there is no checkpoint.

    Args:
        run_dir: the run folder.
        report: called with a sentence about each damaged checkpoint that is skipped.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    steps = run_dir.checkpoint_steps()
    for checkpoint in map(run_dir.checkpoint, reversed(steps)):
        if is_valid(checkpoint):
            return checkpoint
        report(f"{checkpoint} is damaged: skipped")
    if steps:
        raise RunError(
            f"{run_dir.checkpoints} has no checkpoint that is undamaged: restore one of {', '.join(map(str, steps))}, "
            "or remove that folder to train again from the start"
        )
    return None


def resume_checkpoint(run_dir: RunDir, report: Callable[[str], None], start: int = 0) -> Path | None:
    """Return the checkpoint to continue from, and remove from the folder what does not belong to it.

    That is what a killed save left, and rewinds after the checkpoint's step: the run will come to them again.

    Args:
        run_dir: the run folder.
        report: see `newest_checkpoint`.
        start: step of another run from which this one starts, if it has no checkpoint yet.

    Raises:
        RunError: metrics.jsonl is damaged or lacks steps before the checkpoint, or all checkpoints are damaged.
    """
    for leftover in run_dir.checkpoints.glob(".*-step-*.ckpt"):
        remove(leftover)
    checkpoint = newest_checkpoint(run_dir, report)
    step = start if checkpoint is None else step_of(checkpoint)
    run_dir.write_rewinds([rewind for rewind in run_dir.rewinds() if rewind["to_step"] <= step])
    if checkpoint is None:
        return None
    lines = sum(1 for _ in run_dir.losses(step))
    if lines < step:
        raise RunError(
            f"{run_dir.metrics_file} has {lines} lines, but the checkpoint is of step {step}: "
            "restore the file, or remove the folder to train again"
        )
    return checkpoint


def rewind(run_dir: RunDir, to_step: int, from_step: int) -> None:
    """Take a run folder back from one step to the checkpoint of another.

    The lines that are removed from metrics.jsonl go into rewound-N.jsonl. If this is interrupted, the rewind has not
    happened: the run comes to the same step again.
    """
    skipped = run_dir.skipped_batches(from_step) + from_step - to_step
    rewinds = [*run_dir.rewinds(), {"from_step": from_step, "to_step": to_step, "skipped_batches": skipped}]
    for step in reversed(run_dir.checkpoint_steps()):
        if step > to_step:
            remove(run_dir.checkpoint(step))
    lines = run_dir.metrics_lines()[to_step:]
    write_atomic(run_dir.path / f"rewound-{len(rewinds)}.jsonl", "".join(f"{line}\n" for line in lines))
    run_dir.write_rewinds(rewinds)
