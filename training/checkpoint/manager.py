"""When a run saves a checkpoint, what is in it, and which checkpoints are kept.

A checkpoint is written under a temporary name, synced and renamed; only then are older ones removed. It holds what
Lightning saves (weights, optimizer, schedule, loops), the clipper's statistics, the data position, the states of the
random number generators, the configuration, and the metrics up to its step. In a sharded run each process writes its
shard. With `trainer.async_save` a copy is written while training continues.

A save that fails, for example on a full disk, is reported and does not end training. The last one must succeed. The
folder of the checkpoints may be removed or moved meanwhile: the next save makes it again.
"""

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
from common.root_cause import root_cause
from training.checkpoint.format import publish, write
from training.checkpoint.rng import rng_states, set_rng_states
from training.config.schema import Config
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank


@dataclass
class CheckpointManager:
    """Saves every `trainer.checkpoint_every` steps, after the last step, and before training stops.

    It keeps the newest `trainer.keep_last` checkpoints, those at multiples of `trainer.keep_every`, and the last
    healthy ones, of any step and of a multiple of `trainer.checkpoint_every`.
    """

    run_dir: RunDir
    config: Config
    is_healthy: Callable[[int], bool]  # whether the run was healthy after a step
    console: Console

    def __post_init__(self) -> None:
        self._last_attempt = -1
        self._saved: set[int] = set()  # steps of which this run has written a checkpoint, or from which it resumed
        self._failure: BaseException | None = None
        self._rng_states: dict[str, Any] | None = None
        self._group: Any = None
        self._device_type = "cpu"
        self._token = ""  # of the temporary names, the same in all processes
        self._writer: ThreadPoolExecutor | None = None
        self._await_pending: Callable[[], None] = lambda: None

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides Lightning's state."""
        return {"config": self.config.model_dump(mode="json", by_alias=True), "random": rng_states()}

    def load_extra_state(self, checkpoint: dict[str, Any]) -> None:
        """Take the states of the random number generators, which `start` restores."""
        self._rng_states = checkpoint.get("random")

    def start(self, step: int, device: torch.device) -> None:
        """Prepare for training from a step on, which has a checkpoint unless it is 0. All processes call it."""
        self._last_attempt = step
        self._saved.add(step)
        self._token = broadcast_from_rank0(partial(secrets.token_hex, 8))
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
        """Whether a checkpoint is to be saved after a step, after which training may be stopping."""
        trainer = self.config.trainer
        regular = step % trainer.checkpoint_every == 0
        return step != self._last_attempt and (regular or stopping or step == trainer.max_steps)

    def save(self, step: int, dump: Callable[[], dict[str, Any]]) -> None:
        """Save what `dump` returns after a step, once the checkpoint before is written. All processes call it."""
        self._last_attempt = step
        self._await_pending()
        checkpoint = dump()
        if failure := broadcast_from_rank0(self._make_folder):
            self._report_failure(step, failure)
            return
        if not (rank() == 0 or self.config.trainer.sharded):
            return
        if self._writer is None:
            self._conclude(step, partial(self._write, checkpoint, step))
        else:
            written = self._writer.submit(self._write, _copy_to_cpu(checkpoint, self._device_type), step)
            self._await_pending = partial(self._conclude, step, written.result)

    def finish(self) -> None:
        """Wait for the last checkpoint. In all processes it is a `RunError` if rank 0 could not save it."""
        self._await_pending()
        if self._writer is not None:
            self._writer.shutdown()
        if problem := broadcast_from_rank0(self._unsaved):
            raise RunError(problem)

    def _unsaved(self) -> str | None:
        """Return a sentence about the last step if it could not be saved."""
        if self._failure is None:
            return None
        newest = self._newest_saved()
        restart = "starts again" if newest is None else f"continues after step {newest}"
        return f"step {self._last_attempt} is not saved ({_reason(self._failure)}): the same command {restart}"

    def _newest_saved(self) -> int | None:
        """Return the newest of the saved steps whose checkpoint is still on the disk; `None` if there is none."""
        with suppress(OSError):  # the folder may have become one that cannot be read, which is about to be reported
            return max(self._saved.intersection(self.run_dir.checkpoint_steps()), default=None)
        return None

    def _make_folder(self) -> OSError | None:
        """Make the folder of the checkpoints if it is gone, and return the error if that fails.

        A link in its place, to where somebody has moved it, is removed: nothing is written outside the run folder.
        """
        folder = self.run_dir.checkpoints
        try:
            if folder.is_symlink():
                folder.unlink()
            if not folder.is_dir():
                folder.mkdir()
                self.console.print(f"{folder} was removed or moved: it is made again", style="bold red")
        except OSError as error:
            return error
        return None

    def _write(self, checkpoint: dict[str, Any], step: int) -> None:
        """Write a checkpoint, give it its final name, and remove those that need not be kept."""
        final, sharded = self.run_dir.checkpoint(step), self.config.trainer.sharded
        temporary = tmp_path(final, self._token)
        if rank() > 0:
            write(checkpoint, temporary, sharded, False, self._group)
            return
        try:
            write(checkpoint, temporary, sharded, True, self._group)
            publish(temporary, final)
        except (Exception, CheckpointException):
            with suppress(OSError):  # it may not exist, and the cause is about to be reported
                remove(temporary)
            raise
        try:
            self._remove_old(step)
        except OSError as error:
            self.console.print(f"older checkpoints could not be removed: {error}", style="bold red")

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

    def _conclude(self, step: int, write: Callable[[], None]) -> None:
        """Call `write`, which writes a checkpoint or waits until it is written. Report the error if that fails."""
        self._await_pending = lambda: None
        try:
            write()
        except (Exception, CheckpointException) as error:  # a full disk can raise almost anything
            self._report_failure(step, error)
        else:
            self._saved.add(step)
            self._failure = None

    def _report_failure(self, step: int, error: BaseException) -> None:
        self._failure = error
        newest = self._newest_saved()
        last = "there is none yet" if newest is None else f"the last is of step {newest}"
        problem = f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED: {_reason(error)}"
        self.console.print(f"{problem}. Training continues; {last}.", style="bold red")


def _copy_to_cpu(checkpoint: dict[str, Any], device_type: str) -> dict[str, Any]:
    """Return a checkpoint whose tensors are on the CPU, and are not changed by training."""

    def copy(tensor: Tensor) -> Tensor:
        if device_type != "cpu" and isinstance(tensor, DTensor):
            return tensor  # Lightning has just copied it to the CPU
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()

    return tree_map_only(Tensor, copy, checkpoint)


def _reason(error: BaseException) -> str:
    """Return in one line why a checkpoint could not be written."""
    return one_line(root_cause(error))
