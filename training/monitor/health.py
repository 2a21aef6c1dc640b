"""Whether a run is healthy, judged by its losses, and what happens when it stays non-finite.

A single non-finite step is handled by the clipper, which does not move the weights. Many in a row mean that the weights
or the data cannot be trained on.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console

from common.errors import RunError
from training.config.schema import TrainerConfig
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0

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


@dataclass
class NonFiniteGuard:
    """Counts consecutive non-finite steps, and ends training or rewinds the run when there are too many.

    All processes reach the limit at the same flush of the metrics. The batches from the last healthy checkpoint to the
    step that reached the limit are skipped, however late that is detected. A run is rewound to multiples of
    `trainer.checkpoint_every` or to the start of a fork, never to the checkpoint of an interruption.
    """

    run_dir: RunDir
    trainer: TrainerConfig
    fork_step: int  # step of the other run that this one was forked from; 0: none
    rewind_run: Callable[[int, int], None]  # rewinds the run folder to the first step from the second, on rank 0
    console: Console

    def __post_init__(self) -> None:
        self.divergence = DivergenceDetector()
        self._consecutive = 0
        self._limit_reached_at: tuple[int, int] | None = None  # a step, and the non-finite steps up to it

    def restore(self, losses: Iterable[float | None]) -> None:
        """Count the steps of the run so far, which alone do not reach the limit."""
        for loss in losses:
            self._count(loss)

    def add(self, step: int, loss: float | None) -> None:
        """Count the next step; its loss is `None` if it or the gradients were not finite."""
        self._count(loss)
        if self._limit_reached_at is None and self._consecutive >= self.trainer.max_consecutive_nonfinite:
            self._limit_reached_at = step, self._consecutive

    def _count(self, loss: float | None) -> None:
        self.divergence.add(loss)
        self._consecutive = self._consecutive + 1 if loss is None else 0

    @property
    def limit_reached(self) -> bool:
        """Whether training is to end: the limit is reached, and `trainer.on_nonfinite` is not skip."""
        return self.trainer.on_nonfinite != "skip" and self._limit_reached_at is not None

    def rewind(self) -> int:
        """Rewind the run folder to the last healthy checkpoint, and return its step. All processes call it.

        Raises:
            RunError: `trainer.on_nonfinite` ends the run, or it cannot be rewound.
        """
        assert self._limit_reached_at is not None
        step, count = self._limit_reached_at
        healthy, rewinds = broadcast_from_rank0(lambda: (self._last_healthy(), len(self.run_dir.rewinds())))
        reason = f"loss or gradients were not finite for {count} steps in a row, up to step {step}"
        if healthy is None:
            raise RunError(
                f"{reason}, and there is no checkpoint from before: the run ends here; another lr or clip may help"
            )
        if self.trainer.on_nonfinite == "stop":
            raise RunError(
                f"{reason}: trainer.on_nonfinite=stop ends the run here; fork_from={self.run_dir.path}@{healthy} is "
                "a run from the last healthy checkpoint, with other settings"
            )
        if rewinds >= self.trainer.max_rewinds:
            raise RunError(f"{reason}, after {rewinds} rewinds (trainer.max_rewinds): the run ends here")
        broadcast_from_rank0(lambda: self.rewind_run(healthy, step))
        self.console.print(
            f"{reason}: rewinding to step {healthy} and skipping the {step - healthy} batches since", style="bold red"
        )
        return healthy

    def _last_healthy(self) -> int | None:
        regular = [step for step in self.run_dir.checkpoint_steps() if step % self.trainer.checkpoint_every == 0]
        return max(filter(self.divergence.is_healthy, [self.fork_step, *regular]), default=None)
