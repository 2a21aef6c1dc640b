"""When a run saves a checkpoint, what is in it, and which checkpoints are kept.

A checkpoint is written under a temporary name, synced and renamed; only then are older ones removed. It holds what
Lightning saves (weights, optimizer, schedule, loops), the clipper's statistics, the data position, the states of the
random number generators, and the configuration. The metrics up to its step are on the disk before it is. In a sharded
run each process writes its shard. With `trainer.async_save` a copy is written while training continues.

A save that fails, for example on a full disk, is reported and does not end training. The last one must succeed.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from common.errors import RunError, one_line
from common.files import remove, tmp_path
from training.checkpoint.format import publish, write
from training.config.schema import Config
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank
from training.runtime.rng import rng_states, set_rng_states


class CheckpointManager:
    """Saves every `trainer.checkpoint_every` steps, after the last step, and before training stops.

    Kept are the newest `trainer.keep_last` checkpoints, those at multiples of `trainer.keep_every`, and the last
    healthy ones, of any step and of a multiple of `trainer.checkpoint_every`.

    Args:
        run_dir: run folder.
        config: configuration of the run, which is stored in each checkpoint.
        is_healthy: whether the run was healthy after a step.
        assert_metrics_on_disk: raises `OSError` unless the metrics up to a step are on the disk.
        console: reports saves that fail.

    Attributes:
        last_saved: step of the last complete checkpoint, as rank 0 knows it; `None`: none.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: Config,
        is_healthy: Callable[[int], bool],
        assert_metrics_on_disk: Callable[[int], None],
        console: Console,
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.is_healthy = is_healthy
        self.assert_metrics_on_disk = assert_metrics_on_disk
        self.console = console
        self.last_saved: int | None = None
        self._last_attempt = -1
        self._rng_states: dict[str, Any] | None = None
        self._group: Any = None
        self._device_type = "cpu"
        self._writer: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future[None]] | None = None
        self._failure: BaseException | None = None

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides Lightning's state."""
        return {"config": self.config.model_dump(mode="json", by_alias=True), "random": rng_states()}

    def load_extra_state(self, checkpoint: dict[str, Any]) -> None:
        """Take the states of the random number generators, which `start` restores."""
        self._rng_states = checkpoint.get("random")

    def start(self, step: int, device: torch.device) -> None:
        """Prepare for training from a step on, which has a checkpoint unless it is 0. All processes call it."""
        self._last_attempt = step
        self.last_saved = step or None
        self._device_type = device.type
        if self._rng_states is not None:
            set_rng_states(self._rng_states)
        if self.config.trainer.async_save:
            use_gpu = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
            self._writer = ThreadPoolExecutor(1, "checkpoint", use_gpu)
            if self.config.trainer.sharded:
                # The writer has a process group of its own: training goes on in the others meanwhile.
                self._group = dist.new_group(backend="gloo")

    def is_due(self, step: int, stopping: bool) -> bool:
        """Whether a checkpoint is to be saved after a step.

        Args:
            step: optimizer step, counted from 1.
            stopping: whether training ends after it.
        """
        trainer = self.config.trainer
        regular = step % trainer.checkpoint_every == 0
        return step != self._last_attempt and (regular or stopping or step == trainer.max_steps)

    def save(self, step: int, dump: Callable[[], dict[str, Any]]) -> None:
        """Save a checkpoint, once the one before is written. All processes call it.

        Args:
            step: optimizer step, counted from 1.
            dump: returns the state of the run.
        """
        self._last_attempt = step
        self._wait()
        checkpoint = dump()
        if not (rank() == 0 or self.config.trainer.sharded):
            return
        if self._writer is not None:
            done = self._writer.submit(self._write, _copy_to_cpu(checkpoint, self._device_type), step)
        else:
            done = Future()
            try:
                self._write(checkpoint, step)
                done.set_result(None)
            except (Exception, CheckpointException) as error:  # a full disk can raise almost anything
                done.set_exception(error)
        self._pending = step, done
        if self._writer is None:
            self._wait()

    def finish(self) -> None:
        """Wait for the last checkpoint. All processes call it, and learn whether rank 0 saved it.

        Raises:
            RunError: the last checkpoint could not be saved.
        """
        self._wait()
        if self._writer is not None:
            self._writer.shutdown()
        if problem := broadcast_from_rank0(self._unsaved):
            raise RunError(problem)

    def _unsaved(self) -> str | None:
        """Return a sentence about the last step if it could not be saved."""
        if self._failure is None:
            return None
        restart = "starts again" if self.last_saved is None else f"continues after step {self.last_saved}"
        return f"step {self._last_attempt} is not saved ({_reason(self._failure)}): the same command {restart}"

    def _write(self, checkpoint: dict[str, Any], step: int) -> None:
        """Write a checkpoint, give it its final name, and remove those that need not be kept."""
        final, is_rank0 = self.run_dir.checkpoint(step), rank() == 0
        temporary = tmp_path(final)
        try:
            write(checkpoint, temporary, self.config.trainer.sharded, is_rank0, self._group)
            if is_rank0:
                self.assert_metrics_on_disk(step)
                publish(temporary, final)
        except (Exception, CheckpointException):
            if is_rank0:
                with suppress(OSError):  # it may not exist, and the cause is about to be reported
                    remove(temporary)
            raise
        if is_rank0:
            try:
                self._remove_old(step)
            except OSError as error:
                self.console.print(f"older checkpoints could not be removed: {error}", style="bold red", markup=False)

    def _remove_old(self, step: int) -> None:
        """Remove the checkpoints up to a step that need not be kept. Later ones are damaged, and were skipped."""
        trainer = self.config.trainer
        past = [other for other in self.run_dir.checkpoint_steps() if other <= step]
        healthy = [other for other in past if self.is_healthy(other)]
        regular = [other for other in healthy if other % trainer.checkpoint_every == 0]
        kept = {*past[-trainer.keep_last :], *healthy[-1:], *regular[-1:]}
        for other in past:
            if other not in kept and not (trainer.keep_every and other % trainer.keep_every == 0):
                remove(self.run_dir.checkpoint(other))

    def _wait(self) -> None:
        """Wait until the pending checkpoint is written, and report it if that failed."""
        if self._pending is None:
            return
        (step, done), self._pending = self._pending, None
        error = done.exception()
        if error is None:
            self.last_saved, self._failure = step, None
            return
        self._failure = error
        last = "there is none yet" if self.last_saved is None else f"the last is of step {self.last_saved}"
        self.console.print(
            f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED: {_reason(error)}. Training continues; {last}.",
            style="bold red",
            markup=False,
        )


def _copy_to_cpu(checkpoint: dict[str, Any], device_type: str) -> dict[str, Any]:
    """Return a checkpoint whose tensors are on the CPU, and are not changed by training."""

    def copy(tensor: Tensor) -> Tensor:
        if device_type != "cpu" and isinstance(tensor, DTensor):
            return tensor  # Lightning has just copied it to the CPU
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()

    return tree_map_only(Tensor, copy, checkpoint)


def _reason(error: BaseException) -> str:
    """Return an error in one line. torch's distributed format wraps the errors of all processes: the first counts."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
