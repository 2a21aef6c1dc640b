"""What to do when losses or gradients stay non-finite: nothing, stop, or rewind and skip the batches since.

A single non-finite step is handled by the clipper, which does not move the weights. Many in a row mean that the weights
or the data cannot be trained on.
"""

from collections.abc import Callable, Iterable

from rich.console import Console

from common.errors import RunError
from training.config.schema import TrainerConfig
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0


class RestartFromCheckpoint(Exception):
    """The run continues from an earlier checkpoint."""


class NonFiniteGuard:
    """Counts consecutive non-finite steps, and ends training or rewinds the run when there are too many.

    All processes reach the limit at the same flush of the metrics. The batches from the last healthy checkpoint to the
    step that reached the limit are skipped, however late that is detected.

    Args:
        run_dir: run folder.
        trainer: `on_nonfinite`, `max_consecutive_nonfinite`, `max_rewinds` and `checkpoint_every`. The run is rewound
            to multiples of the last, never to the checkpoint of an interruption.
        fork_step: step of the other run that this one was forked from; 0: none.
        is_healthy: whether the run was healthy after a step.
        rewind_run: rewinds the run folder to the first step from the second; only rank 0 calls it.
        console: reports a rewind.

    Attributes:
        limit_reached_at: step that reached the limit, and the number of non-finite steps up to it; `None`: none.
    """

    def __init__(
        self,
        run_dir: RunDir,
        trainer: TrainerConfig,
        fork_step: int,
        is_healthy: Callable[[int], bool],
        rewind_run: Callable[[int, int], None],
        console: Console,
    ) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.fork_step = fork_step
        self.is_healthy = is_healthy
        self.rewind_run = rewind_run
        self.console = console
        self.limit_reached_at: tuple[int, int] | None = None
        self._consecutive = 0

    def restore(self, losses: Iterable[float | None]) -> None:
        """Count the non-finite steps at the end of the run so far, which alone do not reach the limit."""
        for loss in losses:
            self._consecutive = self._consecutive + 1 if loss is None else 0

    def add(self, step: int, loss: float | None) -> None:
        """Count the next step; its loss is `None` if it or the gradients were not finite."""
        self._consecutive = self._consecutive + 1 if loss is None else 0
        if self.limit_reached_at is None and self._consecutive >= self.trainer.max_consecutive_nonfinite:
            self.limit_reached_at = step, self._consecutive

    @property
    def limit_reached(self) -> bool:
        """Whether training is to end: the limit is reached, and `trainer.on_nonfinite` is not skip."""
        return self.trainer.on_nonfinite != "skip" and self.limit_reached_at is not None

    def rewind(self) -> int:
        """Rewind the run folder to the last healthy checkpoint, and return its step. All processes call it.

        Raises:
            RunError: `trainer.on_nonfinite` ends the run, or it cannot be rewound.
        """
        assert self.limit_reached_at is not None
        step, count = self.limit_reached_at
        healthy, rewinds = broadcast_from_rank0(lambda: (self._last_healthy(), len(self.run_dir.rewinds())))
        reason = f"loss or gradients were not finite for {count} steps in a row, up to step {step}"
        if healthy is None:
            raise RunError(
                f"{reason}, and there is no checkpoint from before: the run ends here; another lr or clip may help"
            )
        if self.trainer.on_nonfinite == "stop":
            raise RunError(
                f"{reason}: trainer.on_nonfinite=stop ends the run here; resume_from={self.run_dir.path}@{healthy} is "
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
        """Return the last step to which the run can be rewound; `None` if there is none."""
        regular = [step for step in self.run_dir.checkpoint_steps() if step % self.trainer.checkpoint_every == 0]
        return max((step for step in [self.fork_step, *regular] if self.is_healthy(step)), default=None)
