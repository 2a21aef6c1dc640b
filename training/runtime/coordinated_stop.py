"""Stopping a run between two steps, the same two in all of its processes."""

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class CoordinatedStop:
    """Ends training after the same step in all processes, once any of them has received a signal.

    An asynchronous gloo all-reduce overlaps with each step: the processes learn one step later whether any of them got
    a signal. No device is waited for.
    """

    def __init__(self) -> None:
        self.local_signal = 0  # number of the first signal that this process received; 0: none
        self.global_signal = 0  # number of the signal that ends training in all processes; 0: none
        self._group: Any = None
        self._pending: tuple[Tensor, Any] | None = None

    def request(self, signum: int) -> None:
        """Ask to stop. A signal handler calls it: it sets a flag, and on Ctrl-C writes a line on a terminal."""
        if not self.local_signal and signum == signal.SIGINT and sys.stderr.isatty():
            with suppress(OSError):
                os.write(2, b"\nsaving after this step; Ctrl-C again quits at once\n")
        self.local_signal = self.local_signal or signum

    def start(self, world_size: int) -> None:
        """Make a process group for this alone. All processes call it."""
        if world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def poll(self) -> bool:
        """Return whether training is to end, as of the end of the step before. All processes call it after a step."""
        self.finish()
        if self._group is None:
            self.global_signal = self.local_signal
        else:
            signum = torch.tensor([self.local_signal])
            self._pending = signum, dist.all_reduce(signum, dist.ReduceOp.MAX, self._group, async_op=True)
        return self.global_signal > 0

    def sync(self) -> bool:
        """Return whether training is to end, as of now. All processes call it, and wait for each other.

        Long work after a step calls it now and then, and ends early if training is to end.
        """
        self.global_signal = self.local_signal
        if dist.is_initialized() and dist.get_world_size() > 1:
            signum = torch.tensor([self.local_signal])
            dist.all_reduce(signum, dist.ReduceOp.MAX, self._group)
            self.global_signal = int(signum)
        return self.global_signal > 0

    def finish(self) -> None:
        """Complete the last exchange: a signal in the last step ends the run in all processes too."""
        if self._pending is not None:
            signum, work = self._pending
            self._pending = None
            work.wait()
            self.global_signal = self.global_signal or int(signum)
