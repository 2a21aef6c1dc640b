"""Checkpoints: complete or absent.

A checkpoint is written under another name, synced, and renamed; only then are older ones removed. It holds
all that Lightning keeps (weights, optimizer, schedule, loops), the clipper's statistics and the data position.
Metrics up to its step are on disk before it is. A sharded run has each process write its own part.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from training.checkpoint_files import publish, remove, step_of
from training.folder import RunFolder
from training.metrics import Metrics


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file; Lightning's own first builds all of it once more in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to the local `path`, which is not synced and may be left half-written."""
        torch.save(checkpoint, path)


class Checkpoints(pl.Callback):
    """Save every `every` optimizer steps, after the last one, and before training stops.

    Args:
        folder: run folder.
        metrics: flushed before each save.
        every: steps between checkpoints.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: RunFolder, metrics: Metrics, every: int, keep: int) -> None:
        self.folder = folder
        self.metrics = metrics
        self.every = every
        self.keep = keep
        self._saved = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of the step resumed from, which is saved already."""
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Save if it is time."""
        step = trainer.global_step
        if step != self._saved and (step % self.every == 0 or trainer.should_stop or step == trainer.max_steps):
            self._saved = step
            self.metrics.flush(trainer, pl_module)
            self.save(trainer, step)

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Save a checkpoint of this step, and remove the oldest beyond `keep`."""
        final = self.folder.checkpoints / f"step-{step:08d}.ckpt"
        aside = final.with_name(f".saving-{final.name}")
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            publish(aside, final)
            kept = [path for path in sorted(self.folder.checkpoints.glob("step-*.ckpt")) if step_of(path) <= step]
            for old in kept[: -self.keep]:  # later ones are damaged, and were passed over
                remove(old)
        self.metrics.clock.mark("saving")
