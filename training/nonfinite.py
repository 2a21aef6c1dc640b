"""What to do when losses or gradients stay other than finite: nothing, stop, or go back and past the bad batches.

A single such step is the clipper's: it does not move the weights. Many in a row mean that the weights are beyond help,
or the data.
"""

from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from training.folder import RunFolder
from training.metrics import Metrics
from training.processes import RunError, of_rank_0


class Rewound(Exception):
    """The run is to be taken up again from an earlier checkpoint."""


class Nonfinite(pl.Callback):
    """End training once `in_a_row` steps were not finite, and say how to go on.

    All processes know of it at the same step, the first at which the metrics are brought over.

    Args:
        policy: skip, which never ends it, stop or rewind.
        in_a_row: steps.
        most_rewinds: in a run.
        metrics: which count such steps.

    Attributes:
        tripped: step after which training ended; `None`: it did not end for this.
    """

    def __init__(self, policy: str, in_a_row: int, most_rewinds: int, metrics: Metrics) -> None:
        self.policy = policy
        self.in_a_row = in_a_row
        self.most_rewinds = most_rewinds
        self.metrics = metrics
        self.tripped: int | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if it is enough."""
        if self.policy != "skip" and self.metrics.nonfinite_in_a_row >= self.in_a_row:
            self.tripped = trainer.global_step
            trainer.should_stop = True

    def go_back(self, folder: RunFolder, console: Console) -> int:
        """Make a run folder that of the run at its last healthy step, and return the step. All processes call it.

        Raises:
            RunError: by the policy the run ends here, or it cannot go back.
        """
        step = self.tripped
        assert step is not None
        healthy, rewinds = of_rank_0(lambda: (self._healthy(folder), len(folder.rewinds())))
        said = f"loss or gradients were not finite for {self.in_a_row} steps in a row, up to step {step}"
        if healthy is None:
            raise RunError(f"{said}, and there is no checkpoint from before: the run ends here")
        if self.policy == "stop":
            raise RunError(
                f"{said}: trainer.nonfinite=stop ends the run here; resume_from={folder.path}@{healthy} is a run from "
                "the last healthy checkpoint, with other settings"
            )
        if rewinds >= self.most_rewinds:
            raise RunError(f"{said}, after {rewinds} rewinds (trainer.most_rewinds): the run ends here")
        of_rank_0(lambda: folder.rewind(healthy, step))
        console.print(
            f"{said}: going back to step {healthy}, and past the {step - healthy} batches since", style="bold red"
        )
        return healthy

    def _healthy(self, folder: RunFolder) -> int | None:
        """Return the last step of which there is a checkpoint, and at which the run was healthy."""
        return max((step for step in folder.steps() if self.metrics.health.at(step)), default=None)
