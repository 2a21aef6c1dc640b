"""metrics.jsonl: one line a step, in the order of steps, each step once.

A step's numbers stay tensors on the device, its times events there. Every `log_every` steps one transfer brings them
over; then they are written, and shown to whoever listens (progress display, wandb). A number that is not finite, or
does not exist at that step or on that device, is null. On resuming, lines after the checkpoint's step are dropped: they
will be computed again.
"""

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor

from common.files import write_atomic
from training.module import PretrainingModule
from training.monitor.divergence import DivergenceDetector
from training.monitor.step_timer import Spans, StepTimer, seconds
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0
from training.runtime.hardware import peak_memory, reset_peak_memory
from zclip import ClippingStrategy
from zclip.integrations.lightning import ClippingCallback

Row = dict[str, float | int | None]


class Metrics(pl.Callback):
    """Record every optimizer step.

    Fields of a line: `step` (from 1), `tokens` (so far), `loss` (cross entropy, mean over the global batch, nats per
    token, before the step), `lr`, and the strategy's telemetry; mean since the last transfer `tokens_per_second` and
    `mfu`, the share of the devices' peak that they take; of rank 0 `data_seconds`, `forward_backward_seconds`,
    `clip_seconds` and `optimizer_seconds` of the step, and `saving_seconds` that it waited for a checkpoint;
    `peak_memory_gib` so far, since this process began to train, the most that one has had: allocated on a GPU, resident
    otherwise.

    Args:
        folder: run folder.
        strategy: whose telemetry to record.
        tokens_per_step: tokens in a global batch.
        peak_tokens_per_second: of all devices at their peak; `None` where that is not known.
        log_every: steps between transfers.
        listeners: called with each row, on rank 0, after it is written.
        console: told if the file cannot be written.

    Attributes:
        health: of the run, by its losses so far.
        consecutive_nonfinite: how many of the last steps had a loss or gradients that were not finite.
    """

    def __init__(
        self,
        folder: RunDir,
        strategy: ClippingStrategy,
        tokens_per_step: int,
        peak_tokens_per_second: float | None,
        log_every: int,
        max_consecutive_nonfinite: int,
        listeners: list[Callable[[Row], None]],
        console: Console,
    ) -> None:
        self.folder = folder
        self.strategy = strategy
        self.tokens_per_step = tokens_per_step
        self.peak_tokens_per_second = peak_tokens_per_second
        self.log_every = log_every
        self.listeners = listeners
        self.console = console
        self.health = DivergenceDetector()
        self.max_consecutive_nonfinite = max_consecutive_nonfinite
        self.consecutive_nonfinite = 0
        self.tripped: tuple[int, int] | None = None
        self._pending: list[tuple[int, dict[str, Tensor], Spans]] = []
        self._losses: list[Tensor] = []
        self._file: BinaryIO | None = None
        self._unwritten: list[bytes] = []
        self._step = self._length = 0  # of the last line; bytes up to its end
        self._failure: OSError | None = None
        self._since = 0.0
        self.clock = StepTimer(torch.device("cpu"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file behind the last line that counts."""
        for loss in broadcast_from_rank0(lambda: list(self.folder.losses(trainer.global_step))):
            self._count(loss)
        if trainer.is_global_zero:
            kept = self.folder.metrics_lines(trainer.global_step)
            write_atomic(self.folder.metrics_file, "".join(line + "\n" for line in kept))
            self._file = self.folder.metrics_file.open("ab", buffering=0)
            self._step, self._length = len(kept), self.folder.metrics_file.stat().st_size
        self._since = time.perf_counter()
        reset_peak_memory(pl_module.device)
        self.clock = StepTimer(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Mark that the batch is there."""
        self.clock.mark("data")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Take the loss of a micro-batch, and the whole step's numbers after its last."""
        self._losses.append(outputs["cross_entropy"])
        if len(self._losses) < trainer.accumulate_grad_batches:
            self.clock.mark("forward_backward")
            return
        self.clock.mark("optimizer")
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        self._pending.append((trainer.global_step, {"loss": loss, **self.strategy.telemetry}, self.clock.lap()))
        if trainer.global_step % self.log_every == 0:
            self.flush(trainer, pl_module)

    def flush(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring pending steps over, write them to the disk, and tell the listeners."""
        if not self._pending:
            return
        assert isinstance(pl_module, PretrainingModule)
        names = list(self._pending[0][1])
        table = torch.stack(
            [
                torch.stack([row[name].to(pl_module.device, torch.float32) for name in names])
                for _, row, _ in self._pending
            ]
        )
        losses = table[:, names.index("loss")]
        losses.copy_(trainer.strategy.reduce(losses.clone(), reduce_op="mean"))  # each process has that of its rows
        most = torch.tensor(float(peak_memory(pl_module.device)), dtype=torch.float64, device=pl_module.device)
        most = trainer.strategy.reduce(most, reduce_op="max")
        values, memory = table.tolist(), float(most)  # the transfer; it waits for the device, once
        now = time.perf_counter()
        rate = len(self._pending) * self.tokens_per_step / (now - self._since)
        self._since = now
        rows: list[Row] = []
        for (step, _, spans), numbers in zip(self._pending, values, strict=True):
            lr = pl_module.lr * pl_module.lr_factor(step - 1)
            fields = dict(zip(names, numbers, strict=True))
            finite = math.isfinite(fields["loss"]) and math.isfinite(fields["grad_norm"])
            self._count(fields["loss"] if finite else None)
            if self.tripped is None and not finite and self.consecutive_nonfinite >= self.max_consecutive_nonfinite:
                self.tripped = step, self.consecutive_nonfinite
            rows.append(
                {
                    "step": step,
                    "tokens": step * self.tokens_per_step,
                    "lr": lr,
                    **{key: value if math.isfinite(value) else None for key, value in fields.items()},
                    "tokens_per_second": round(rate, 1),
                    "mfu": round(rate / self.peak_tokens_per_second, 4) if self.peak_tokens_per_second else None,
                    **{f"{part}_seconds": round(value, 6) for part, value in seconds(spans).items()},
                    "peak_memory_gib": round(memory / 2**30, 3),
                }
            )
        self._pending.clear()
        if self._file is not None:
            self._unwritten += [json.dumps(row).encode() + b"\n" for row in rows]
            self._write(self._file)
            for row in rows:
                for listener in self.listeners:
                    listener(row)
        self.clock.mark("writing")

    def _count(self, loss: float | None) -> None:
        """Take the loss of the next step; `None` if it or the gradients are not finite."""
        self.health.add(loss)
        self.consecutive_nonfinite = self.consecutive_nonfinite + 1 if loss is None else 0

    def _write(self, file: BinaryIO) -> None:
        """Write the lines that are not on the disk yet; if that fails, leave them for the next time."""
        try:
            os.ftruncate(file.fileno(), self._length)  # no part of a line that could not be written
            lines = b"".join(self._unwritten)
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError as error:
            if self._failure is None:
                self.console.print(
                    f"{self.folder.metrics_file} CANNOT BE WRITTEN: {error.strerror}. Training goes on, and tries again; "
                    "nothing is saved meanwhile.",
                    style="bold red",
                    markup=False,
                )
            self._failure = error
            return
        self._length += sum(map(len, self._unwritten))
        self._step += len(self._unwritten)
        self._unwritten.clear()
        self._failure = None

    def assert_flushed_to(self, step: int) -> None:
        """Raise `OSError` unless the lines up to a step are on the disk."""
        if self._step < step:
            raise OSError(f"{self.folder.metrics_file} ends with step {self._step}: {self._failure}")

    @property
    def writes(self) -> bool:
        """Whether this process writes the metrics: rank 0 does, while it trains."""
        return self._file is not None

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


class ClipCallback(ClippingCallback):
    """The clipper, which says when it begins and ends.

    Args:
        strategy: clips.
        metrics: whose clock is told.
        anew: whether to leave the statistics in a checkpoint, which are of another strategy.
    """

    def __init__(self, strategy: ClippingStrategy, metrics: Metrics, anew: bool = False) -> None:
        super().__init__(strategy)
        self.metrics = metrics
        self.anew = anew

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics."""
        if not self.anew:
            super().load_state_dict(state_dict)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the gradients."""
        self.metrics.clock.mark("forward_backward")
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.metrics.clock.mark("clip")
