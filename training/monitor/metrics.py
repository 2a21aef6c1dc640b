"""metrics.jsonl: one line per optimizer step, in the order of steps, each step once.

The numbers of a step stay tensors on the device, and its times stay events there. Every `log_every` steps one transfer
copies them to the host; then they are written, and passed to the listeners (progress display, wandb). A number that is
not finite, or does not exist at that step or on that device, is null. When a run resumes, the lines after the
checkpoint's step are dropped: those steps are computed again.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from common.files import write_atomic
from training.monitor.step_timer import Timings, seconds
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank
from training.runtime.hardware import peak_memory, reset_peak_memory
from zclip import ClippingStrategy

#: A line of metrics.jsonl.
Row = dict[str, float | int | None]


class MetricsRecorder:
    """Records every optimizer step.

    Fields of a line: `step` (from 1); `tokens` so far; `loss` (cross entropy before the step, mean over the global
    batch, nats per token); `lr`; and the strategy's telemetry. Means since the last transfer are `tokens_per_second`
    and `mfu`, the share of the devices' peak that is reached. Times of rank 0 are `data_seconds`,
    `forward_backward_seconds`, `clip_seconds` and `optimizer_seconds`, and the waits `saving_seconds` and
    `evaluation_seconds` before the step. `peak_memory_gib` is the maximum over processes since training started:
    allocated memory on a GPU, resident memory otherwise.

    Args:
        run_dir: run folder.
        strategy: clipping strategy, whose telemetry is recorded.
        log_every: steps between transfers.
        tokens_per_step: tokens in a global batch.
        peak_tokens_per_second: tokens per second of all devices at their peak; `None` if it is not known.
        listeners: called on rank 0 with each row, after it is written.
        console: reports a file that cannot be written.
    """

    def __init__(
        self,
        run_dir: RunDir,
        strategy: ClippingStrategy,
        log_every: int,
        tokens_per_step: int,
        peak_tokens_per_second: float | None,
        listeners: Sequence[Callable[[Row], None]],
        console: Console,
    ) -> None:
        self.run_dir = run_dir
        self.strategy = strategy
        self.log_every = log_every
        self.tokens_per_step = tokens_per_step
        self.peak_tokens_per_second = peak_tokens_per_second
        self.listeners = listeners
        self.console = console
        self._pending: list[tuple[int, float, dict[str, Tensor], Timings]] = []
        self._losses: list[Tensor] = []
        self._file: BinaryIO | None = None
        self._unwritten: list[bytes] = []
        self._step = self._length = 0  # step of the last line on the disk, and bytes up to its end
        self._failure: OSError | None = None
        self._device = torch.device("cpu")
        self._reduce: Callable[[Tensor, str], Tensor] = lambda tensor, _: tensor
        self._last_transfer = 0.0

    def start(self, step: int, device: torch.device, reduce: Callable[[Tensor, str], Tensor]) -> Sequence[float | None]:
        """Open the file behind the line of the step that the run resumes from. All processes call it.

        Args:
            step: step that the run resumes from; 0: none.
            device: device of the model.
            reduce: returns the `"mean"` or `"max"` of a tensor over the processes.

        Returns:
            The losses of the steps so far in nats per token; `None` for steps that were not finite.
        """
        self._device, self._reduce = device, reduce
        losses = broadcast_from_rank0(lambda: list(self.run_dir.losses(step)))
        if rank() == 0:
            lines = self.run_dir.metrics_lines(step)
            write_atomic(self.run_dir.metrics_file, "".join(line + "\n" for line in lines))
            self._file = self.run_dir.metrics_file.open("ab", buffering=0)
            self._step, self._length = len(lines), self.run_dir.metrics_file.stat().st_size
        self._last_transfer = time.perf_counter()
        reset_peak_memory(device)
        return losses

    def add_micro_batch(self, loss: Tensor) -> None:
        """Add the mean loss of a micro-batch of this process to the step."""
        self._losses.append(loss)

    def record(self, step: int, lr: float, timings: Timings) -> None:
        """Record a step, whose micro-batches have been added."""
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        self._pending.append((step, lr, {"loss": loss, **self.strategy.telemetry}, timings))

    def is_due(self, step: int) -> bool:
        """Whether recorded steps are to be flushed after this one."""
        return step % self.log_every == 0

    def flush(self) -> list[tuple[int, float | None]]:
        """Copy the recorded steps to the host, write them, and call the listeners. All processes call it.

        Returns:
            Each step with its loss in nats per token; `None` if the loss or the gradients were not finite.
        """
        if not self._pending:
            return []
        rows = self._transfer()
        if self._file is not None:
            self._unwritten += [json.dumps(row).encode() + b"\n" for row in rows]
            self._write(self._file)
            for row in rows:
                for listener in self.listeners:
                    listener(row)
        return [(int(row["step"] or 0), None if row["grad_norm"] is None else row["loss"]) for row in rows]

    def _transfer(self) -> list[Row]:
        """Return the recorded steps as rows. The device is waited for once."""
        names = list(self._pending[0][2])
        table = torch.stack(
            [
                torch.stack([numbers[name].to(self._device, torch.float32) for name in names])
                for _, _, numbers, _ in self._pending
            ]
        )
        losses = table[:, names.index("loss")]
        losses.copy_(self._reduce(losses.clone(), "mean"))  # each process has the loss of its own sequences
        memory = torch.tensor(float(peak_memory(self._device)), dtype=torch.float64, device=self._device)
        memory = self._reduce(memory, "max")
        values, peak_bytes = table.tolist(), float(memory)  # the transfer
        now = time.perf_counter()
        rate = len(self._pending) * self.tokens_per_step / (now - self._last_transfer)
        self._last_transfer = now
        rows: list[Row] = [
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "lr": lr,
                **{name: value if math.isfinite(value) else None for name, value in zip(names, numbers, strict=True)},
                "tokens_per_second": round(rate, 1),
                "mfu": round(rate / self.peak_tokens_per_second, 4) if self.peak_tokens_per_second else None,
                **{f"{phase}_seconds": round(value, 6) for phase, value in seconds(timings).items()},
                "peak_memory_gib": round(peak_bytes / 2**30, 3),
            }
            for (step, lr, _, timings), numbers in zip(self._pending, values, strict=True)
        ]
        self._pending.clear()
        return rows

    def _write(self, file: BinaryIO) -> None:
        """Write the lines that are not on the disk yet; if that fails, keep them for the next call."""
        try:
            os.ftruncate(file.fileno(), self._length)  # drops a line that was written in part
            lines = b"".join(self._unwritten)
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError as error:
            if self._failure is None:
                self.console.print(
                    f"{self.run_dir.metrics_file} CANNOT BE WRITTEN: {error.strerror}. Training continues and tries "
                    "again; no checkpoint is saved until then.",
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
            raise OSError(f"{self.run_dir.metrics_file} ends with step {self._step}: {self._failure}")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
