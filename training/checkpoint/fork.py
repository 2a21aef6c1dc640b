"""A new run from a step of an old one: `resume_from=runs/main/NAME@STEP`, say with another clipping strategy.

Model, text, seed and batches must be the old run's; clipping, optimizer and length are the new one's. The statistics of
the clipper go on if its settings are the same, and start anew otherwise.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from common.files import write_atomic
from common.text import flatten
from training.checkpoint.format import is_valid
from training.config.checks import identity, run_path
from training.config.parallelism import sharded
from training.run_dir import RunDir
from training.runtime.distributed import rank

#: What a run and those forked from it have in common.
SHARED = ("model", "data", "seed", "trainer.global_batch_size", "trainer.precision")


class ForkSource(NamedTuple):
    """Where a forked run starts.

    Attributes:
        folder: of the old run.
        step: after which.
        same_clipping: whether the old run clips as the new one does.
    """

    folder: RunDir
    step: int
    same_clipping: bool

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of that step."""
        return self.folder.checkpoint(self.step)

    def begin(self, folder: RunDir) -> None:
        """Write into the folder of the new run what the old one had done up to the step, unless it is there."""
        if folder.metrics.exists():
            return
        folder.write_rewinds([rewind for rewind in self.folder.rewinds() if rewind["to_step"] <= self.step])
        write_atomic(folder.metrics, "".join(f"{line}\n" for line in self.folder.lines(self.step)))


def origin(cfg: DictConfig) -> ForkSource | None:
    """Return what a run is to start from; `None` if from nothing, or if it has a checkpoint of its own.

    Raises:
        UserError: there is no such checkpoint, or it is not of such a run.
    """
    if cfg.resume_from is None or RunDir(run_path(cfg)).steps():
        return None
    given = f"resume_from={cfg.resume_from}"
    found = re.fullmatch(r"(.+)@(\d+)", cfg.resume_from)
    if found is None:
        raise UserError(f"{given} is not allowed: it must be a run folder and a step, as runs/main/NAME@100")
    folder, step = RunDir(Path(found[1])), int(found[2])
    if not folder.config.is_file():
        raise UserError(f"{given} is not possible: there is no run in {folder.path}")
    if not folder.checkpoint(step).exists():
        there = ", ".join(map(str, folder.steps())) or "none"
        raise UserError(f"{given} is not possible: the run has no checkpoint of that step, but of {there}")
    old: Any = OmegaConf.load(folder.config)
    ours, theirs = identity(cfg), identity(old)
    mine, others = flatten(ours), flatten(theirs)
    for key in mine:
        shared = any(f"{key}.".startswith(f"{part}.") for part in SHARED) and not key.startswith("data.corruption.")
        if shared and mine[key] != others.get(key):
            raise UserError(f"{given} is not possible with {key}={mine[key]}: that run has {key}={others.get(key)}")
    if sharded(old) != sharded(cfg):
        raise UserError(
            f"{given} is not possible with trainer.strategy={cfg.trainer.strategy}: the checkpoints of "
            f"trainer.strategy={old.trainer.strategy} are {'' if sharded(old) else 'not '}sharded"
        )
    if len(folder.lines(step)) < step:
        raise UserError(f"{given} is not possible: {folder.metrics} does not reach that step")
    if step >= cfg.trainer.max_steps:
        raise UserError(f"{given} is not possible with trainer.max_steps={cfg.trainer.max_steps}: it must be more")
    if rank() == 0 and not is_valid(folder.checkpoint(step)):
        raise UserError(f"{given} is not possible: {folder.checkpoint(step)} is damaged")
    return ForkSource(folder, step, ours["clip"] == theirs["clip"])
