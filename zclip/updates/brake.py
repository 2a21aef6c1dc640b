"""UpdateBrake: lower the learning rate when updates grow, and release it slowly."""

import math
from types import MappingProxyType

import torch
from torch import Tensor

from zclip.arguments import integer, is_number, require
from zclip.decision import State
from zclip.saved_state import refuse
from zclip.updates.base import UpdateDecision, UpdateRule

#: Steps over which the mean of log norms and its lag are taken, and over which their variance.
MEAN_STEPS, VARIANCE_STEPS = 50, 300


class UpdateBrake(UpdateRule):
    """Bound the update to a multiple of its usual norm, but remember the scale, and let it return to 1 slowly.

    An experiment of this library. When gradients shrink, Adam's second moment lags behind them, and the effective step
    grows until it is unstable (arXiv 2506.04805). A rule that forgets its scale after each step holds the run at that
    edge. This one remembers it, as s in (0, 1]. With x the log of the update's norm, L that of its usual level, and
    d the standard deviation of x from step to step::

        a      = max(log margin, sigmas * d)
        bound  = L + a
        log s <- min(release * log s, bound - x)
        F      = M + min(D, 0)
        y      = max(min(x, bound), F - max(2 d, 1))
        L     <- L + (y - L) / (rise_steps if it rises, else fall_steps)
        d^2   <- d^2 + (2 min(y - F, 0)^2 - d^2) / 300
        D     <- D + (y - M - D) / 50
        M     <- M + (y - M) / 50

    The step is taken at the rate `lr * s`. The level is the lower edge of the norms: it falls within tens of steps, as
    norms do after the start, and rises over a thousand. So neither the run-up of a spike nor an outlier raises it much.

    A norm that has risen for good by a factor f would be followed after rise_steps * log f / (bound - L) steps, which
    can be thousands. So after `recovery_window` norms in a row above the bound, the rule resets all statistics but s,
    and takes the next norms for the usual ones. s returns slowly as ever, because a run at the edge of stability can
    have such a row too. One norm below the bound ends the row.

    Norms that vary by themselves, as those of small batches, widen the bound. d counts what is below their mean M,
    where the run-up of a spike has no part, but the return from it has. So a tail of high norms does not widen it: if a
    few norms are far above the usual again and again, they hold the rate down. D takes out how far norms that fall
    steadily, as after the start, are below M. In the first 300 steps d^2 is the mean of all steps since the warm-up, at
    whose last norm M begins. One norm far below the usual counts as one at 1/e of the expected F, or two standard
    deviations below it.

    Args:
        margin: multiple of the usual norm that an update may have, > 1. Default 1.6.
        release: factor on log s in each step, from 0 to below 1. Default 0.999; 0 forgets at once.
        sigmas: standard deviations that log norms may be above their usual level, from 0. Default 5; 0: `margin` alone.
        rise_steps: steps over which the level follows higher norms, >= 1. Default 1000.
        fall_steps: steps over which it follows lower norms, >= 1. Default 30.
        warmup_steps: steps at the beginning without a bound, >= 1. L is their highest norm, because momentum is still
            building up. Default 20; a momentum above 0.9 needs more, such as 2 / (1 - momentum).
        recovery_window: number of norms in a row above the bound after which the statistics are reset, >= 8. Default
            500; `None` disables it.

    Telemetry, in addition to that of `UpdateRule`: `update_recovered`, whether this step resets the statistics.
    """

    nonnegative = ("variance", "count", "above")
    added = MappingProxyType({"recovery_window": 500})
    added_statistics = ("above",)

    def __init__(
        self,
        margin: float = 1.6,
        release: float = 0.999,
        sigmas: float = 5.0,
        rise_steps: int = 1000,
        fall_steps: int = 30,
        warmup_steps: int = 20,
        recovery_window: int | None = 500,
    ) -> None:
        super().__init__()
        self.margin = require(is_number(margin) and 1 < margin < math.inf, "margin", margin, "a finite number above 1")
        self.release = require(
            is_number(release) and 0 <= release < 1, "release", release, "a number from 0 to below 1"
        )
        self.sigmas = require(is_number(sigmas) and 0 <= sigmas < math.inf, "sigmas", sigmas, "a finite number from 0")
        self.rise_steps = integer("rise_steps", rise_steps)
        self.fall_steps = integer("fall_steps", fall_steps)
        self.warmup_steps = integer("warmup_steps", warmup_steps)
        self.recovery_window = integer("recovery_window", recovery_window, minimum=8, null="to switch recovery off")

    def initial_state(self, like: Tensor) -> State:
        """Return a scale of 1, and no level yet."""
        count = torch.zeros((), dtype=torch.int64, device=like.device)
        zeros = {name: torch.zeros_like(like) for name in ("log_scale", "mean", "lag", "variance")}
        return {"level": torch.full_like(like, -torch.inf), **zeros, "count": count, "above": count.clone()}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the scale is at most 1, and the level is known from the first step on."""
        name = type(self).__name__
        if not state["log_scale"] <= 0:
            refuse(name, "state.log_scale", state["log_scale"], "at most 0")
        if not (state["level"].isfinite() if state["count"] > 0 else state["level"] == -torch.inf):
            refuse(name, "state.level", state["level"], "finite after the first step, and -inf before")

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Release the scale, lower it if the update is above the bound, and let the level follow the norm."""
        level, mean, lag, variance, count = (state[k] for k in ("level", "mean", "lag", "variance", "count"))
        log_norm, begins = norm.log(), count < self.warmup_steps
        spread = variance.sqrt()
        bound = torch.where(begins, torch.inf, level + (self.sigmas * spread).clamp(min=math.log(self.margin)))
        released = self.release * state["log_scale"]
        log_scale = torch.minimum(released, bound - log_norm)
        expected = mean + lag.clamp(max=0)
        bounded = torch.maximum(torch.minimum(log_norm, bound), expected - (2 * spread).clamp(min=1.0))
        rise, deviation = bounded - level, bounded - mean
        followed = level + rise / torch.where(rise > 0, self.rise_steps, self.fall_steps)
        shortfall = (bounded - expected).clamp(max=0)
        weight = (count + 1 - self.warmup_steps).clamp(min=1, max=VARIANCE_STEPS)
        new = {
            "log_scale": log_scale,
            "level": torch.where(begins, torch.maximum(level, log_norm), followed),
            "mean": torch.where(begins, log_norm, mean + deviation / MEAN_STEPS),
            "lag": torch.where(begins, lag, lag + (deviation - lag) / MEAN_STEPS),
            "variance": torch.where(begins, variance, variance + (2 * shortfall.square() - variance) / weight),
            "count": count + 1,
            "above": torch.where(log_norm > bound, state["above"] + 1, 0),
        }
        recovers = torch.zeros_like(begins)
        if self.recovery_window is not None:
            recovers, first = new["above"] >= self.recovery_window, self.initial_state(norm) | {"log_scale": log_scale}
            new = {key: torch.where(recovers, first[key], value) for key, value in new.items()}
        scale = log_scale.exp().clamp(min=torch.finfo(norm.dtype).tiny)  # it must not underflow to 0
        return UpdateDecision(scale, log_scale < released, bound.exp(), new, {"update_recovered": recovers})
