"""What the host knows of a counter on a device, without a device sync."""

import torch
from torch import Tensor


class HostCount:
    """The value of a counter, which may be a few steps old.

    On a CPU the counter is read at once. On an accelerator, `read` begins an asynchronous copy to the host unless one
    is on its way, and returns the last one that has arrived. On the meta device nothing is ever known.

    Attributes:
        known: the value that is known; `None`: none has arrived yet.
        age: number of calls of `read` since the counter had it.
    """

    def __init__(self) -> None:
        self._follow(None)

    def _follow(self, counter: Tensor | None) -> None:
        """Begin with a counter, of which nothing is known yet."""
        self.known: int | None = None
        self.age = 0
        self._counter = counter
        self._host: Tensor | None = None  # pinned memory
        self._arrived: torch.Event | None = None  # of the copy that is on its way
        self._copy_age = 0

    def read(self, counter: Tensor) -> int | None:
        """Return the newest value that the host knows; call it once a step.

        Args:
            counter: 0-dim integer tensor, changed in place. What is known of another one is forgotten.
        """
        if counter.is_meta:
            return None
        if counter is not self._counter:
            self._follow(counter)
        if counter.is_cpu:
            self.known = int(counter)
            return self.known
        self.age += 1
        self._copy_age += 1
        if self._arrived is not None and self._arrived.query():
            self.known, self.age, self._arrived = int(self._host), self._copy_age, None  # type: ignore[arg-type]
        if self._arrived is None:
            if self._host is None:
                with torch.inference_mode(False):
                    self._host = torch.zeros((), dtype=counter.dtype, device="cpu", pin_memory=True)
            self._host.copy_(counter, non_blocking=True)
            self._copy_age, self._arrived = 0, torch.Event(counter.device)
            self._arrived.record()
        return self.known
