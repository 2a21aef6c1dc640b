"""When a run saves a checkpoint, what is in it, and which checkpoints are kept.

A checkpoint is written under a temporary name, synced and renamed; only then are older ones removed. It holds what
Lightning saves (weights, optimizer, schedule, loops), the clipper's statistics, the data position, the states of the
random number generators, and the configuration. The metrics up to its step are on the disk before it is. In a sharded
run each process writes its shard. With `trainer.async_save` a copy is written while training continues.

A save that fails, for example on a full disk, is reported and does not end training. The last one must succeed.
"""

import random
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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


@dataclass
class CheckpointManager:
    """Saves every `trainer.checkpoint_every` steps, after the last step, and before training stops.

    It keeps the newest `trainer.keep_last` checkpoints, those at multiples of `trainer.keep_every`, and the last
    healthy ones, of any step and of a multiple of `trainer.checkpoint_every`.
    """

    run_dir: RunDir
    config: Config
    is_healthy: Callable[[int], bool]  # whether the run was healthy after a step
    assert_metrics_on_disk: Callable[[int], None]  # raises `OSError` unless the metrics up to a step are there
    console: Console

    def __post_init__(self) -> None:
        self._last_attempt = -1
        self._last_saved: int | None = None  # as rank 0 knows it
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
        self._last_saved = step or None
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
        restart = "starts again" if self._last_saved is None else f"continues after step {self._last_saved}"
        return f"step {self._last_attempt} is not saved ({_reason(self._failure)}): the same command {restart}"

    def _write(self, checkpoint: dict[str, Any], step: int) -> None:
        """Write a checkpoint, give it its final name, and remove those that need not be kept."""
        final, sharded = self.run_dir.checkpoint(step), self.config.trainer.sharded
        temporary = tmp_path(final, self._token)
        if rank() > 0:
            write(checkpoint, temporary, sharded, False, self._group)
            return
        try:
            write(checkpoint, temporary, sharded, True, self._group)
            self.assert_metrics_on_disk(step)
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
            self._failure = error
            last = "there is none yet" if self._last_saved is None else f"the last is of step {self._last_saved}"
            problem = f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED: {_reason(error)}"
            self.console.print(f"{problem}. Training continues; {last}.", style="bold red")
        else:
            self._last_saved, self._failure = step, None


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


def rng_states() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch on the CPU, and torch on this process's GPU.

    They consist of types that `torch.load(weights_only=True)` accepts.
    """
    state: Any = np.random.get_state()  # noqa: NPY002 - libraries use the global generator
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.tensor(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Restore what `rng_states` returned."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
