"""A new run from a step of an old one: `resume_from=runs/main/NAME@STEP`, say with another clipping strategy.

Model, text, seed and batches must be the old run's; clipping, optimizer and length are the new one's. The statistics of
the clipper go on if its settings are the same, and start anew otherwise.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from training.checkpoint_files import undamaged
from training.config import ConfigError, identity, run_path
from training.folder import RunFolder, flat, write_whole
from training.processes import rank
from training.split import sharded

#: What a run and those forked from it have in common.
SHARED = ("model", "data", "seed", "trainer.global_batch_size", "trainer.precision")


class Origin(NamedTuple):
    """Where a forked run starts.

    Attributes:
        folder: of the old run.
        step: after which.
        same_clipping: whether the old run clips as the new one does.
    """

    folder: RunFolder
    step: int
    same_clipping: bool

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of that step."""
        return self.folder.checkpoint(self.step)

    def begin(self, folder: RunFolder) -> None:
        """Write into the folder of the new run what the old one had done up to the step, unless it is there."""
        if folder.metrics.exists():
            return
        folder.write_rewinds([rewind for rewind in self.folder.rewinds() if rewind["to_step"] <= self.step])
        write_whole(folder.metrics, "".join(f"{line}\n" for line in self.folder.lines(self.step)))


def origin(cfg: DictConfig) -> Origin | None:
    """Return what a run is to start from; `None` if from nothing, or if it has a checkpoint of its own.

    Raises:
        ConfigError: there is no such checkpoint, or it is not of such a run.
    """
    if cfg.resume_from is None or RunFolder(run_path(cfg)).steps():
        return None
    given = f"resume_from={cfg.resume_from}"
    found = re.fullmatch(r"(.+)@(\d+)", cfg.resume_from)
    if found is None:
        raise ConfigError(f"{given} is not allowed: it must be a run folder and a step, as runs/main/NAME@100")
    folder, step = RunFolder(Path(found[1])), int(found[2])
    if not folder.config.is_file():
        raise ConfigError(f"{given} is not possible: there is no run in {folder.path}")
    if not folder.checkpoint(step).exists():
        there = ", ".join(map(str, folder.steps())) or "none"
        raise ConfigError(f"{given} is not possible: the run has no checkpoint of that step, but of {there}")
    old: Any = OmegaConf.load(folder.config)
    ours, theirs = identity(cfg), identity(old)
    mine, others = flat(ours), flat(theirs)
    for key in mine:
        shared = any(f"{key}.".startswith(f"{part}.") for part in SHARED) and not key.startswith("data.bad_batches.")
        if shared and mine[key] != others.get(key):
            raise ConfigError(f"{given} is not possible with {key}={mine[key]}: that run has {key}={others.get(key)}")
    if sharded(old) != sharded(cfg):
        raise ConfigError(
            f"{given} is not possible with trainer.strategy={cfg.trainer.strategy}: the checkpoints of "
            f"trainer.strategy={old.trainer.strategy} are {'' if sharded(old) else 'not '}sharded"
        )
    if len(folder.lines(step)) < step:
        raise ConfigError(f"{given} is not possible: {folder.metrics} does not reach that step")
    if step >= cfg.trainer.max_steps:
        raise ConfigError(f"{given} is not possible with trainer.max_steps={cfg.trainer.max_steps}: it must be more")
    if rank() == 0 and not undamaged(folder.checkpoint(step)):
        raise ConfigError(f"{given} is not possible: {folder.checkpoint(step)} is damaged")
    return Origin(folder, step, ours["clip"] == theirs["clip"])
