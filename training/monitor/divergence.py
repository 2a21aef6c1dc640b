"""Whether a run diverges, judged by its losses: it is rewound only to a step at which it was healthy."""

import math
import statistics
from collections import deque

#: Number of losses whose median is compared.
WINDOW = 20

#: Nats per token by which the median loss of a window may exceed the lowest median before it.
LOSS_MARGIN = 0.5


class DivergenceDetector:
    """Decides for each step of a run whether the run was healthy after it.

    A run is healthy if the last 20 losses (or all, if there are fewer) are finite and their median is at most 0.5 nats
    per token above the lowest such median so far.
    """

    def __init__(self) -> None:
        self._healthy: list[bool] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf

    def add(self, loss: float | None) -> None:
        """Add the loss of the next step in nats per token; `None` stands for a step that was not finite."""
        self._recent.append(math.nan if loss is None else loss)
        if not all(map(math.isfinite, self._recent)):
            self._healthy.append(False)
            return
        median = statistics.median(self._recent)
        self._lowest = min(self._lowest, median)
        self._healthy.append(median <= self._lowest + LOSS_MARGIN)

    def is_healthy(self, step: int) -> bool:
        """Whether the run was healthy after a step, counted from 1. Steps without a loss are not healthy."""
        return 0 < step <= len(self._healthy) and self._healthy[step - 1]
