"""A candidate for a strategy of our own: LogZScore that skips the step of a norm far above the mean."""

from typing import Any

from zclip import LogZScore
from zclip.arguments import positive
from zclip.decision import ClipResult, GradStats, State


class SkippingLogZScore(LogZScore):
    """Clip a norm whose logarithm is an outlier, and skip the step if it is a large one.

    The z-score and its statistics are those of `LogZScore`. A norm of z > z_thresh is clipped, and the optimizer skips
    the step where z > skip_thresh. What enters the statistics is at most z_thresh deviations from the mean, so that an
    outlier does not hide the next one. A lasting rise is not skipped for good: the deviation grows until norms are
    below the threshold, see `LogZScore`.

    Args:
        skip_thresh: z-score above which the step is skipped, > 0. Default 5.0.
        arguments: those of `LogZScore`.

    Telemetry, in addition to that of `LogZScore`: `skipped`, 0 or 1.
    """

    def __init__(self, skip_thresh: float = 5.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.skip_thresh = positive("skip_thresh", skip_thresh)

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return the coefficient of `LogZScore`, and whether to skip the step."""
        result = super().clip(stats, state)
        skip = result.telemetry["spike"] & (result.telemetry["z"] > self.skip_thresh)
        return result._replace(skip=skip, telemetry={**result.telemetry, "skipped": skip})
