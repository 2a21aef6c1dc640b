"""LogZScore: clip a norm whose logarithm is an outlier among those of the steps before it."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import decay, integer, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import Decision, State


class LogZScore(ClippingStrategy):
    """Z-score clipping of log norms, whose exponential statistics are bias-corrected: a rule of this library.

    Norms are positive and can vary by factors, so distances are taken in the logarithm. With x the log of the norm and
    t the number of norms so far, including this one::

        w = (1 - alpha) / (1 - alpha^t)
        z = (x - mean) / std,    std = max(sqrt(var), min_std)
        y = x, but at most z_thresh std above or below the mean after the warm-up
        var  <- (1 - w) (var + w (y - mean)^2)
        mean <- mean + w (y - mean)

    Mean and variance are the weighted ones of the norms so far, from the first step on. So the warm-up, in which
    nothing but `max_grad_norm` clips, can be short. After it, a norm of z > z_thresh is clipped to exp(mean + z_thresh
    std). Norms of z < -z_thresh are reported, not scaled. A norm of 0 does not enter the statistics.

    There is no lock-in for z_thresh > 1. While a lasting change holds y at the bound, the variance grows by a factor of
    about 1 + (1 - alpha) (z_thresh^2 - 1) in each step, and the bound follows.

    Args:
        alpha: smoothing factor, 0 <= alpha < 1. Default 0.97.
        z_thresh: z-score above which a norm is clipped, > 0. Default 3.0.
        max_grad_norm: upper bound on the norm after clipping, > 0; it does not affect the statistics. Default `None`.
        warmup_steps: number of first norms that are not clipped by the rule, >= 1. Default 10.
        min_std: lower bound on the standard deviation of log norms, > 0. Default 0.02, which is 2 % of a norm.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Telemetry, in addition to that of `ClippingStrategy`: `z` (NaN during the warm-up and for a norm of 0), `mean` (the
    geometric mean of the norms before the step) and `std` (of their logs), `spike` and `low` (z above z_thresh, and
    below -z_thresh), 0 or 1.
    """

    nonnegative = ("count", "var")

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 3.0,
        max_grad_norm: float | None = None,
        warmup_steps: int = 10,
        min_std: float = 0.02,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(max_grad_norm, **policy)
        self.alpha = decay("alpha", alpha)
        self.z_thresh = positive("z_thresh", z_thresh)
        self.warmup_steps = integer("warmup_steps", warmup_steps)
        self.min_std = positive("min_std", min_std)

    def initial_state(self, like: Tensor) -> State:
        """Return a count, mean and variance of 0."""
        count = torch.zeros_like(like, dtype=torch.int64)
        return {"count": count, "mean": torch.zeros_like(like), "var": torch.zeros_like(like)}

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the target of a spike, infinity otherwise, and the updated statistics."""
        count, mean, var = state["count"], state["mean"], state["var"]
        present = norm > 0
        warm = (count >= self.warmup_steps) & present
        x = torch.where(present, norm, 1.0).log()
        std = var.sqrt().clamp(min=self.min_std)
        z = (x - mean) / std
        spike, low = warm & (z > self.z_thresh), warm & (z < -self.z_thresh)
        bound = self.z_thresh * std
        # The distance is limited, not the log norm: a norm far away would leave rounding errors of its size.
        distance = torch.where(warm, (x - mean).clamp(-bound, bound), x - mean)
        weight = (1 - self.alpha) / (1 - self.alpha ** (count + 1).to(norm.dtype))
        weight = weight.clamp(max=1)  # a rounding error above 1 would make the variance negative
        new = {
            "count": count + 1,
            "mean": mean + weight * distance,
            "var": (1 - weight) * (var + weight * distance.square()),
        }
        telemetry = {"z": torch.where(warm, z, torch.nan), "mean": mean.exp(), "std": std, "spike": spike, "low": low}
        target = torch.where(spike, (mean + bound).exp(), torch.inf)
        return Decision(target, {key: torch.where(present, v, state[key]) for key, v in new.items()}, telemetry)
