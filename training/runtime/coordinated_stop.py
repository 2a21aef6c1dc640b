"""Stopping a run between two steps, the same two in all of its processes."""

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor


class CoordinatedStop(pl.Callback):
    """End training after a step, the same in all processes, once any of them has been told to stop.

    Whether one has is passed around beside the steps, on the CPU: each learns at the end of a step what was so at the
    end of the one before. It waits for no device.

    Attributes:
        told: number of the first signal that this process received; 0: none.
        agreed: number of the signal that ends training; 0: none.
    """

    def __init__(self) -> None:
        self.told = 0
        self.agreed = 0
        self._group: Any = None
        self._asked: tuple[Tensor, Any] | None = None

    def tell(self, signum: int) -> None:
        """Ask to stop. To be called from a signal handler: sets a flag, and writes a line on a terminal."""
        if not self.told and signum == signal.SIGINT and sys.stderr.isatty():
            with suppress(OSError):
                os.write(2, b"\nsaving after this step; Ctrl-C again quits at once\n")
        self.told = self.told or signum

    def agree(self) -> bool:
        """Return at once whether training is to end, the same in all processes, which must all ask.

        For what takes long after a step: it is to leave off then.
        """
        self.agreed = self.told
        if dist.is_initialized() and dist.get_world_size() > 1:
            told = torch.tensor([self.told])
            dist.all_reduce(told, dist.ReduceOp.MAX, self._group)
            self.agreed = int(told)
        return self.agreed > 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make a group of the processes for this alone."""
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if it was agreed; ask again."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.agreed = self._ask() if self._group is not None else self.told
        if self.agreed:
            trainer.should_stop = True

    def _ask(self) -> int:
        """Return what was answered to the question before, and ask the next."""
        answer = self._answer()
        told = torch.tensor([self.told])
        self._asked = told, dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True)
        return answer

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        told, asked = self._asked
        self._asked = None
        asked.wait()
        return int(told)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no question open."""
        self._answer()
