"""What to do when losses or gradients stay other than finite: nothing, stop, or go back and past the bad batches.

A single such step is the clipper's: it does not move the weights. Many in a row mean that the weights are beyond help,
or the data.
"""

from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from common.errors import RunError
from training.checkpoint.resume import rewind
from training.monitor.metrics import Metrics
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0


class RestartFromCheckpoint(Exception):
    """The run is to be taken up again from an earlier checkpoint."""


class Nonfinite(pl.Callback):
    """End training once so many steps in a row were not finite, and say how to go on.

    All processes know of it after the same step, the first at which the metrics are brought over; the batches from the
    last healthy checkpoint to the step at which it was enough are those that are left out, whenever that is noticed.

    Args:
        policy: skip, which never ends it, stop or rewind.
        max_rewinds: in a run.
        metrics: which count such steps.
        checkpoint_every: steps; it goes back to checkpoints of multiples of this, not to those of an interruption.
        start: the step of another run from which this one started; 0: of none.
    """

    def __init__(self, policy: str, max_rewinds: int, metrics: Metrics, checkpoint_every: int, start: int) -> None:
        self.policy = policy
        self.max_rewinds = max_rewinds
        self.metrics = metrics
        self.checkpoint_every = checkpoint_every
        self.start = start

    @property
    def tripped(self) -> bool:
        """Whether it is enough, by a policy that ends training."""
        return self.policy != "skip" and self.metrics.tripped is not None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if it is enough."""
        if self.tripped:
            trainer.should_stop = True

    def go_back(self, folder: RunDir, console: Console) -> int:
        """Make a run folder that of the run at its last healthy step, and return the step. All processes call it.

        Raises:
            RunError: by the policy the run ends here, or it cannot go back.
        """
        assert self.metrics.tripped is not None
        step, count = self.metrics.tripped
        healthy, rewinds = broadcast_from_rank0(lambda: (self._healthy(folder), len(folder.rewinds())))
        said = f"loss or gradients were not finite for {count} steps in a row, up to step {step}"
        if healthy is None:
            raise RunError(
                f"{said}, and there is no checkpoint from before: the run ends here; another lr or clip may help"
            )
        if self.policy == "stop":
            raise RunError(
                f"{said}: trainer.on_nonfinite=stop ends the run here; resume_from={folder.path}@{healthy} is a run from "
                "the last healthy checkpoint, with other settings"
            )
        if rewinds >= self.max_rewinds:
            raise RunError(f"{said}, after {rewinds} rewinds (trainer.max_rewinds): the run ends here")
        broadcast_from_rank0(lambda: rewind(folder, healthy, step))
        console.print(
            f"{said}: going back to step {healthy}, and past the {step - healthy} batches since", style="bold red"
        )
        return healthy

    def _healthy(self, folder: RunDir) -> int | None:
        """Return the last step to which the run can go back, and at which it was healthy."""
        there = [step for step in folder.checkpoint_steps() if step % self.checkpoint_every == 0]
        return max((step for step in [self.start, *there] if self.metrics.health.at(step)), default=None)
