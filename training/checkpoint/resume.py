"""Where a run starts or resumes.

`training.config.compose` makes the settings of `resume=FOLDER`. `fit` in `training/run.py` loads the checkpoint.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import RunError
from common.files import remove
from training.checkpoint.fork import ForkSource
from training.checkpoint.state import find_problem
from training.run_dir import RunDir


class Start(NamedTuple):
    """Where a run starts or resumes."""

    step: int
    checkpoint: Path | None  # to load; `None`: new weights
    rewinds: list[dict[str, int]]  # of the run before
    fork: ForkSource | None  # the other run to which the checkpoint belongs; `None`: it is this run's own
    fork_step: int  # step of the other run that this one can be rewound to; 0: none
    changed: bool = False  # whether arguments of the strategy or the rule over updates have changed since it began
    new_data_after: int | None = None  # global batches before this run's data, if the checkpoint is of other data

    @property
    def skipped_batches(self) -> int:
        """Global batches that the run has skipped before."""
        return self.rewinds[-1]["skipped_batches"] if self.rewinds else 0

    @property
    def skipped_before(self) -> int:
        """Global batches skipped by rewinds to earlier steps: a checkpoint of this step was saved after those."""
        return next((r["skipped_batches"] for r in reversed(self.rewinds) if r["to_step"] < self.step), 0)

    @property
    def reset_clipper(self) -> bool:
        """Whether the clipper begins without the statistics in the checkpoint."""
        return self.fork is not None and not self.fork.keeps_clipping

    @property
    def reset_rule(self) -> bool:
        """Whether a rule over updates begins without the statistics in the checkpoint."""
        return self.fork is not None and not self.fork.keeps_rule


def prepare_start(run_dir: RunDir, fork: ForkSource | None, report: Callable[[str], None]) -> Start:
    """Return where a run starts or resumes, and make its folder that of the run at this step. Rank 0 calls it.

    It starts from `fork` if it has no checkpoint yet. What a killed save left is removed, and so are rewinds after the
    step: the run will come to them again.

    Raises:
        RunError: all checkpoints are damaged, or the other run was rewound to the step of a fork with new data.
    """
    for leftover in run_dir.checkpoints.glob(".*-step-*.ckpt"):
        remove(leftover)
    own_step = newest_step(run_dir, report)
    fork_step = 0 if fork is None else fork.step
    step = fork_step if own_step is None else own_step
    run_dir.write_rewinds(run_dir.rewinds(step))
    if own_step is None:
        if fork is not None:
            if problem := find_problem(fork.checkpoint):  # a rewind comes here long after the fork was found
                raise RunError(f"{fork.checkpoint}, from which the run starts, {problem}: restore it")
            fork.copy_history(run_dir)
        checkpoint = fork.checkpoint if fork else None
        new_data_after = fork.batches_before(run_dir) if fork is not None and fork.new_data else None
        return Start(step, checkpoint, run_dir.rewinds(step), fork, fork_step, new_data_after=new_data_after)
    changed = bool(run_dir.setting_changes())
    return Start(step, run_dir.checkpoint(step), run_dir.rewinds(step), None, fork_step, changed)


def newest_step(run_dir: RunDir, report: Callable[[str], None]) -> int | None:
    """Return the step of the newest valid checkpoint; `None` if there is none.

    Damaged ones are skipped and reported. If all are damaged, that is a `RunError`.
    """
    steps = run_dir.checkpoint_steps()
    for step in reversed(steps):
        problem = find_problem(run_dir.checkpoint(step))
        if problem is None:
            return step
        report(f"{run_dir.checkpoint(step)} {problem}: skipped")
    if steps:
        raise RunError(
            f"{run_dir.checkpoints} has no checkpoint that is undamaged: restore one of {', '.join(map(str, steps))}, "
            "or remove that folder to train again from the start"
        )
    return None
