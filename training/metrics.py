"""metrics.jsonl: one line a step, in the order of steps, each step once.

A step's numbers stay tensors on the device. Every `log_every` steps one transfer brings them over; then
they are written, and shown to whoever listens (progress display, wandb). A number that is not finite, or does
not exist at that step, is null. On resuming, lines after the checkpoint's step are dropped: they will be
computed again.
"""

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from torch import Tensor

from training.folder import RunFolder, write_whole
from training.module import PretrainingModule
from zclip import ClippingStrategy

Row = dict[str, float | int | None]


class Metrics(pl.Callback):
    """Record every optimizer step.

    Fields of a line: `step` (from 1), `tokens` (so far), `loss` (cross entropy, mean over the global batch, nats per
    token, before the step), `lr`, `tokens_per_second` (mean since the last transfer), and the strategy's telemetry.

    Args:
        folder: run folder.
        strategy: whose telemetry to record.
        tokens_per_step: tokens in a global batch.
        log_every: steps between transfers.
        listeners: called with each row, on rank 0, after it is written.
    """

    def __init__(
        self,
        folder: RunFolder,
        strategy: ClippingStrategy,
        tokens_per_step: int,
        log_every: int,
        listeners: list[Callable[[Row], None]],
    ) -> None:
        self.folder = folder
        self.strategy = strategy
        self.tokens_per_step = tokens_per_step
        self.log_every = log_every
        self.listeners = listeners
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._losses: list[Tensor] = []
        self._file: TextIO | None = None
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file behind the last line that counts."""
        if trainer.is_global_zero:
            lines = self.folder.metrics.read_text().splitlines() if self.folder.metrics.exists() else []
            kept = lines[: trainer.global_step]
            write_whole(self.folder.metrics, "".join(line + "\n" for line in kept))
            self._file = self.folder.metrics.open("a", encoding="utf-8")
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Take the loss of a micro-batch, and the whole step's numbers after its last."""
        self._losses.append(outputs["cross_entropy"])
        if len(self._losses) < trainer.accumulate_grad_batches:
            return
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        self._pending.append((trainer.global_step, {"loss": loss, **self.strategy.telemetry}))
        if trainer.global_step % self.log_every == 0:
            self.flush(trainer, pl_module)

    def flush(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring pending steps over, write them to the disk, and tell the listeners."""
        if not self._pending:
            return
        assert isinstance(pl_module, PretrainingModule)
        names = list(self._pending[0][1])
        table = torch.stack(
            [torch.stack([row[name].to(pl_module.device, torch.float32) for name in names]) for _, row in self._pending]
        )
        losses = table[:, names.index("loss")]
        losses.copy_(trainer.strategy.reduce(losses.clone(), reduce_op="mean"))  # each process has that of its rows
        values = table.tolist()  # the one transfer; it waits for the device
        now = time.perf_counter()
        rate = len(self._pending) * self.tokens_per_step / (now - self._since)
        self._since = now
        rows: list[Row] = []
        for (step, _), numbers in zip(self._pending, values, strict=True):
            lr = pl_module.lr * pl_module.lr_factor(step - 1)
            fields = dict(zip(names, numbers, strict=True))
            rows.append(
                {
                    "step": step,
                    "tokens": step * self.tokens_per_step,
                    "lr": lr,
                    **{key: value if math.isfinite(value) else None for key, value in fields.items()},
                    "tokens_per_second": round(rate, 1),
                }
            )
        self._pending.clear()
        if self._file is not None:
            self._file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
            for row in rows:
                for listener in self.listeners:
                    listener(row)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is pending and close the file."""
        self.flush(trainer, pl_module)
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file of a run that was interrupted."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
