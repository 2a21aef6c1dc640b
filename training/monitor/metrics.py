"""metrics.jsonl: one line per optimizer step, in the order of steps, each step once.

The numbers of a step stay tensors on the device, and its times stay events there. Every `log_every` steps one transfer
copies them to the host; then they are written, and passed to the listeners (progress display, wandb). A number that is
not finite, or does not exist at that step or on that device, is null. When a run resumes, the lines after the
checkpoint's step are dropped: those steps are computed again.

The file may be removed, cut or replaced by others at any time: it is written again from the history of all steps, which
is in memory, and without times and memory in each checkpoint.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from common.errors import RunError, one_line
from common.files import open_append, write_atomic
from training.config.schema import Config
from training.config.telemetry_names import ReservedNameError, check_telemetry_names
from training.monitor.history import History
from training.monitor.step_timer import Timings, seconds
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank
from training.runtime.hardware import flops_per_token, peak_flops, peak_memory, reset_peak_memory
from zclip import ClippingStrategy
from zclip.updates import OptimizerRule

#: The numbers of a step by name: a line of metrics.jsonl, or the results of an evaluation.
Row = Mapping[str, float | None]

#: Called with a step and its numbers.
Listener = Callable[[int, Row], None]


@dataclass
class MetricsRecorder:
    """Records every optimizer step.

    Fields of a line: `step` (from 1); `tokens` so far; `loss` (cross entropy before the step, mean over the global
    batch, nats per token); `lr` of the schedule; `masked_rows` if there is an instance filter; and the telemetry of the
    strategy and of a rule over updates. Means
    since the last transfer are `tokens_per_second` and `mfu`, the share of the devices' peak that is reached. Times of
    rank 0 are `data_seconds`, `forward_backward_seconds`, `clip_seconds` and `optimizer_seconds`, and the waits
    `saving_seconds` and `evaluation_seconds` before the step. `peak_memory_gib` is the maximum over processes since
    training started: allocated memory on a GPU, resident memory otherwise.
    """

    run_dir: RunDir
    config: Config
    strategy: ClippingStrategy
    listeners: Sequence[Listener]  # called on rank 0 with each line, after it is written
    console: Console
    rule: OptimizerRule | None = None

    def __post_init__(self) -> None:
        self.tokens_per_step = self.config.trainer.global_batch_size * self.config.data.sequence_length
        self.peak_tokens_per_second = peak_tokens_per_second(self.config)
        self.started = False
        self._begun = 0, 0  # step from which this process trains, and the tokens of all steps up to it
        self.history = History()  # on rank 0; before `start` the one of the checkpoint on all ranks
        self._pending: list[tuple[int, float, dict[str, Tensor], Timings]] = []
        self._losses: list[Tensor] = []
        self._checked_names: tuple[str, ...] = ()
        self._file: BinaryIO | None = None
        self._unwritten: list[bytes] = []
        self._written: tuple[int, ...] = ()  # device, inode and size of the file as this process left it
        self._failure: OSError | None = None

    def start(self, step: int, device: torch.device, reduce: Callable[[Tensor, str], Tensor]) -> Sequence[float | None]:
        """Make the file that of the step that the run resumes from, and open it. All processes call it.

        `reduce` returns the `"mean"` or `"max"` of a tensor over the processes.

        Returns:
            The losses of the steps so far in nats per token; `None` stands for steps that were not finite.
        """
        self.started = True
        self._device, self._reduce = device, reduce
        self._begun = step, step * self.tokens_per_step
        losses = broadcast_from_rank0(partial(self._restore, step))
        self._last_transfer = time.perf_counter()
        reset_peak_memory(device)
        return losses

    def _restore(self, step: int) -> list[float | None]:
        """Complete the history of the checkpoint with the times in the file, and return the losses up to a step."""
        in_checkpoint = self.history.steps
        if lost := self.history.merge(self.run_dir.metrics_rows(), step):
            again = "they are written again, without times" if in_checkpoint else "the run goes on without them"
            lines = f"{lost} of {step} lines of {self.run_dir.metrics_file}"
            self.console.print(f"{lines} are lost: {again}", style="bold red")
        if (tokens := self.history.tokens()) is not None:  # a fork's earlier sequences may have had another length
            self._begun = step, tokens
        self._write()
        return self.history.losses()

    def add_micro_batch(self, loss: Tensor) -> None:
        """Add the mean loss of a micro-batch of this process to the step."""
        self._losses.append(loss)

    def record(self, step: int, lr: float, timings: Timings, masked_rows: int = 0) -> None:
        """Record a step, whose micro-batches have been added."""
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        updates = {} if self.rule is None else self.rule.telemetry
        if self._checked_names != (names := (*self.strategy.telemetry, *updates)):
            self._check_names(names)
        masked = {"masked_rows": torch.tensor(masked_rows)} if self.config.data.instance_filter.enabled else {}
        self._pending.append((step, lr, {"loss": loss, **masked, **self.strategy.telemetry, **updates}, timings))

    def _check_names(self, names: tuple[str, ...]) -> None:
        """Raise `RunError` if a name in the telemetry of the strategy or the rule is that of another number."""
        count = len(self.strategy.telemetry)
        owners = type(self.strategy).__name__, type(self.rule).__name__
        try:
            check_telemetry_names(owners[0], names[:count], owners[1], names[count:])
        except ReservedNameError as error:
            raise RunError(str(error)) from error
        self._checked_names = names

    def is_due(self, step: int) -> bool:
        """Whether recorded steps are to be flushed after this one."""
        return step % self.config.trainer.log_every == 0

    def flush(self) -> list[tuple[int, float | None]]:
        """Copy the recorded steps to the host, write them, and call the listeners. All processes call it.

        It returns each step with its loss in nats per token; `None` if it or the gradients were not finite.
        """
        if not self._pending:
            return []
        rows = self._transfer()
        if rank() == 0:
            for row in rows.values():
                self.history.add(row)
                self._unwritten.append(json.dumps(row).encode() + b"\n")
            self._write()
            for step, row in rows.items():
                for listener in self.listeners:
                    listener(step, row)
        return [(step, None if row["grad_norm"] is None else row["loss"]) for step, row in rows.items()]

    def _transfer(self) -> dict[int, Row]:
        """Return the lines of the recorded steps. The device is waited for once."""
        names = list(dict.fromkeys(name for _, _, numbers, _ in self._pending for name in numbers))
        absent = torch.tensor(math.nan)
        table = torch.stack(
            [
                torch.stack([numbers.get(name, absent).to(self._device, torch.float32) for name in names])
                for _, _, numbers, _ in self._pending
            ]
        )
        losses = table[:, names.index("loss")]
        losses.copy_(self._reduce(losses.clone(), "mean"))  # each process has the loss of its own sequences
        memory = torch.tensor(float(peak_memory(self._device)), dtype=torch.float64, device=self._device)
        memory = self._reduce(memory, "max")
        values, peak_bytes = table.tolist(), float(memory)  # the transfer
        now, (begun, tokens) = time.perf_counter(), self._begun
        rate = len(self._pending) * self.tokens_per_step / (now - self._last_transfer)
        self._last_transfer = now
        rows: dict[int, Row] = {
            step: {
                "step": step,
                "tokens": tokens + (step - begun) * self.tokens_per_step,
                "lr": lr,
                **{name: value if math.isfinite(value) else None for name, value in zip(names, numbers, strict=True)},
                "tokens_per_second": round(rate, 1),
                "mfu": round(rate / self.peak_tokens_per_second, 4) if self.peak_tokens_per_second else None,
                **{f"{phase}_seconds": round(value, 6) for phase, value in seconds(timings).items()},
                "peak_memory_gib": round(peak_bytes / 2**30, 3),
            }
            for (step, lr, _, timings), numbers in zip(self._pending, values, strict=True)
        }
        self._pending.clear()
        return rows

    def _write(self) -> None:
        """Write what is not on the disk; if that fails, the next call tries again. Rank 0 calls it."""
        path = self.run_dir.metrics_file
        try:
            if self._file is None or _identity(path) != self._written:
                self._write_all()
            else:
                self._append(self._file)
        except OSError as error:
            if self._failure is None:
                advice = "Training continues and tries again; the lines are kept in the checkpoints."
                self.console.print(f"{path} CANNOT BE WRITTEN: {error.strerror}. {advice}", style="bold red")
            self._failure = error
            return
        self._unwritten.clear()
        self._failure = None

    def _write_all(self) -> None:
        """Write the whole file again, of which others have left something else."""
        path = self.run_dir.metrics_file
        if self._file is not None:
            if self._failure is None:
                self.console.print(f"{path} was changed by another program: it is written again", style="bold red")
            self._file.close()
            self._file = None
        write_atomic(path, b"".join(map(self.history.line, range(1, self.history.steps + 1))))
        self._file = open_append(path)
        self._written = _identity(path)

    def _append(self, file: BinaryIO) -> None:
        *place, length = self._written
        lines = b"".join(self._unwritten)
        written = (*place, length + len(lines))  # not the size now: others may have cut the file since it was looked at
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), length)  # drops a line that was written in part
            raise
        self._written = written

    def finish(self) -> None:
        """Close the file. In all processes it is a `RunError` if its last lines could not be written."""
        if problem := broadcast_from_rank0(self._unfinished):
            raise RunError(problem)

    def _unfinished(self) -> str | None:
        self._write()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._failure is None:
            return None
        return f"{self.run_dir.metrics_file} cannot be written ({one_line(self._failure)}): the same command continues"


def _identity(path: Path) -> tuple[int, ...]:
    """Return device, inode and size of a file, or of a link; nothing if there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size


def peak_tokens_per_second(config: Config) -> float | None:
    """Return the tokens per second of all devices at their peak FLOP/s; `None` if the peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name()) if config.trainer.accelerator == "gpu" else None
    if peak is None:
        return None
    return config.trainer.world_size * peak / flops_per_token(config.model.llama, config.data.sequence_length)
