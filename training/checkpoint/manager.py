"""When a run saves, what, and which checkpoints stay.

A checkpoint is written under another name, synced, and renamed; only then are older ones removed. It holds all that
Lightning keeps (weights, optimizer, schedule, loops), the clipper's statistics, the data position, the states of random
number generators and the configuration. Metrics up to its step are on disk before it is. A sharded run has each process
write its own part. If asked, it is a copy that is written, beside training.

A save that fails, as on a full disk, is told and tried again with the next; the last one must succeed.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from common.errors import RunError
from common.files import remove
from training.checkpoint.format import publish, write
from training.monitor.metrics import Metrics
from training.run_dir import RunDir
from training.runtime.rng import rng_states, set_rng_states


class Checkpoints(pl.Callback):
    """Save every `every` optimizer steps, after the last one, and before training stops.

    Args:
        folder: run folder.
        metrics: flushed before each save; the last checkpoint of a step that they call healthy stays.
        config: resolved configuration of the run, kept in each checkpoint.
        sharded: whether each process has its own part of the model.
        every: steps between checkpoints.
        keep: how many of the newest stay.
        keep_every: those of the multiples of this stay too; `None`: none.
        beside: whether to write a copy, beside training.
        console: told of saves that fail.

    Attributes:
        saved: step of the last checkpoint that is complete, as rank 0 knows; `None`: none.
    """

    def __init__(
        self,
        folder: RunDir,
        metrics: Metrics,
        config: dict[str, Any],
        sharded: bool,
        every: int,
        keep: int,
        keep_every: int | None,
        beside: bool,
        console: Console,
    ) -> None:
        self.folder = folder
        self.metrics = metrics
        self.config = config
        self.sharded = sharded
        self.every = every
        self.keep = keep
        self.keep_every = keep_every
        self.console = console
        self.saved: int | None = None
        self._last = -1
        self._random: dict[str, Any] | None = None
        self._group: Any = None
        self.beside = beside
        self._writer: ThreadPoolExecutor | None = None
        self._writing: tuple[int, Future[None]] | None = None
        self._failure: BaseException | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not keep."""
        checkpoint["config"] = self.config
        checkpoint["random"] = rng_states()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the states of the random number generators; count the batches in micro-batches of this run."""
        self._random = checkpoint.get("random")
        forwards = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):  # saved at the end of a batch, which is complete after
            counts.update({name: forwards - (name == "completed") for name in counts})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of the step resumed from, which is saved already."""
        self._last = trainer.global_step
        self.saved = self._last or None
        if self._random is not None:
            set_rng_states(self._random)
        if self.beside:
            device = trainer.strategy.root_device
            on_gpu = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
            self._writer = ThreadPoolExecutor(1, "checkpoint", on_gpu)
        if self.beside and self.sharded:
            self._group = dist.new_group(backend="gloo")  # the writer's own: training goes on in the others

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Save if it is time."""
        self.save_if_due(trainer, pl_module)

    def save_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a step, if it is time, or the run is to stop."""
        step = trainer.global_step
        if step != self._last and (step % self.every == 0 or trainer.should_stop or step == trainer.max_steps):
            self._last = step
            self.metrics.flush(trainer, pl_module)
            self._save(trainer, step)
            self.metrics.clock.mark("saving")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last checkpoint, all processes for that of rank 0.

        Raises:
            RunError: it could not be saved.
        """
        self._finish()
        if self._writer is not None:
            self._writer.shutdown()
        said = None
        if self._failure is not None:
            on = "starts again" if self.saved is None else f"continues after step {self.saved}"
            said = f"step {self._last} is not saved ({_reason(self._failure)}): the same command {on}"
        if said := trainer.strategy.broadcast(said):
            raise RunError(said)

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        """Save a checkpoint of this step; the one before is waited for."""
        self._finish()
        # As Trainer.save_checkpoint begins; the writing is ours.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        first = trainer.is_global_zero
        if not (first or self.sharded):
            return
        if self._writer is not None:
            done = self._writer.submit(self._write, _copied(checkpoint, trainer.strategy.root_device.type), step, first)
        else:
            done = Future()
            try:
                self._write(checkpoint, step, first)
                done.set_result(None)
            except (Exception, CheckpointException) as error:  # a full disk can come as any
                done.set_exception(error)
        self._writing = step, done
        if self._writer is None:
            self._finish()

    def _write(self, checkpoint: dict[str, Any], step: int, first: bool) -> None:
        """Write a checkpoint, and give it its name; remove those that need not stay."""
        final = self.folder.checkpoint(step)
        aside = final.with_name(f".saving-{final.name}")
        try:
            write(checkpoint, aside, self.sharded, first, self._group)
            if first:
                self.metrics.assert_flushed_to(step)
                publish(aside, final)
        except (Exception, CheckpointException):
            if first:
                with suppress(OSError):  # there may be nothing, and the reason is about to be told
                    remove(aside)
            raise
        if first:
            try:
                self._tidy(step)
            except OSError as error:
                self.console.print(f"older checkpoints could not be removed: {error}", style="bold red", markup=False)

    def _tidy(self, step: int) -> None:
        """Remove the checkpoints up to a step that need not stay. Later ones are damaged, and were passed over."""
        past = [other for other in self.folder.checkpoint_steps() if other <= step]
        healthy = [other for other in past if self.metrics.health.at(other)]
        stay = {*past[-self.keep :], *healthy[-1:], *[other for other in healthy if other % self.every == 0][-1:]}
        for other in past:
            if other not in stay and not (self.keep_every and other % self.keep_every == 0):
                remove(self.folder.checkpoint(other))

    def _finish(self) -> None:
        """Wait until nothing is being written; tell whether it failed."""
        if self._writing is None:
            return
        (step, done), self._writing = self._writing, None
        error = done.exception()
        if error is None:
            self.saved, self._failure = step, None
            return
        self._failure = error
        last = "there is none yet" if self.saved is None else f"the last is of step {self.saved}"
        self.console.print(
            f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED: {_reason(error)}. Training goes on; {last}.",
            style="bold red",
            markup=False,
        )


def _copied(checkpoint: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a checkpoint whose tensors are on the CPU and nobody else's."""

    def copy(tensor: Tensor) -> Tensor:
        if device != "cpu" and isinstance(tensor, DTensor):
            return tensor  # Lightning has brought it over just now
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()

    return tree_map_only(Tensor, copy, checkpoint)


def _reason(error: BaseException) -> str:
    """Say in a line what went wrong; torch's distributed format wraps what did in any process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300]
