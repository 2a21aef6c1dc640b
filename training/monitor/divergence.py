"""Whether a run was well at a step, by its losses: the checkpoint to go back to is one of a step at which it was."""

import math
import statistics
from collections import deque

#: Steps that are looked at together.
WINDOW = 20

#: Nats per token by which the median loss of a window may exceed the lowest before it.
MARGIN = 0.5


class DivergenceDetector:
    """Losses of a run, step after step from the first.

    A run is healthy at a step if the last 20 losses (as many as there are) are finite and their median is at most 0.5
    nats per token above the lowest such median so far: it does not diverge.
    """

    def __init__(self) -> None:
        self._healthy: list[bool] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf

    def add(self, loss: float | None) -> None:
        """Take the loss of the next step, in nats per token; `None` is one that is not finite."""
        self._recent.append(math.nan if loss is None else loss)
        if not all(map(math.isfinite, self._recent)):
            self._healthy.append(False)
            return
        median = statistics.median(self._recent)
        self._lowest = min(self._lowest, median)
        self._healthy.append(median <= self._lowest + MARGIN)

    def at(self, step: int) -> bool:
        """Whether the run was healthy after a step, counted from 1; false of steps that are not known."""
        return 0 < step <= len(self._healthy) and self._healthy[step - 1]
