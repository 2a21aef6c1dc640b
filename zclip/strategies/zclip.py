"""ZClip: clip a norm that is an outlier among the norms of the steps before it."""

import torch
from torch import Tensor

from zclip.base import ClippingStrategy, Decision, State, is_number, require

MODES = ("zscore", "percentile")
CLIP_OPTIONS = ("adaptive_scaling", "mean", "max")


class ZClip(ClippingStrategy):
    """Z-score clipping with exponential moving statistics (arXiv 2504.02507, section 3).

    The first `warmup_steps` norms give the mean and the population variance. After that a norm x has

        z = (x - mean) / (std + eps)

    with the statistics of the steps before. If z > z_thresh the step is a spike, and x is clipped to

        mean + xi(z) std,   xi(z) = z_thresh^2 / z   ("adaptive_scaling", the paper's reciprocal)
                                    0                ("mean")
                                    z_thresh         ("max", and mode="percentile")

    Then, with y the clipped norm on a spike and x otherwise,

        mean <- alpha mean + (1 - alpha) y
        var  <- alpha var  + (1 - alpha) (y - mean)^2     with the new mean

    Statistics are float64 scalars on the gradients' device; no step reads them back.

    Args:
        alpha: smoothing factor, 0 <= alpha < 1. Default 0.97.
        z_thresh: z-score above which a step is a spike, > 0. Default 2.5.
        max_grad_norm: bound on the norm after clipping, and the only clipping during warm-up. It does not
            enter the statistics. Default `None`: no bound.
        eps: added to the standard deviation in z. Default 1e-6.
        warmup_steps: norms that initialise the statistics, >= 1. Default 25.
        mode: "zscore", or "percentile", which is "zscore" with the option "max". Default "zscore".
        clip_option: "adaptive_scaling" (default), "mean" or "max"; ignored by mode="percentile".
        clip_factor: multiplies the target of "adaptive_scaling"; below 1 clips spikes harder. Default 1.0.
        skip_update_on_spike: leave the statistics alone on a spike. Default False.

    Raises:
        ValueError: an argument is out of its range; the message names it, its value and what is allowed.

    Telemetry: `z`, `mean`, `std` (before the step) and `spike` (1 or 0); the first is NaN during warm-up.
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        max_grad_norm: float | None = None,
        eps: float = 1e-6,
        warmup_steps: int = 25,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
    ) -> None:
        require(is_number(alpha) and 0 <= alpha < 1, "alpha", alpha, "a number from 0 to below 1")
        require(is_number(z_thresh) and z_thresh > 0, "z_thresh", z_thresh, "a number above 0")
        require(is_number(eps) and eps > 0, "eps", eps, "a number above 0")
        require(type(warmup_steps) is int and warmup_steps >= 1, "warmup_steps", warmup_steps, "an integer from 1")
        require(mode in MODES, "mode", mode, "one of " + ", ".join(MODES))
        require(clip_option in CLIP_OPTIONS, "clip_option", clip_option, "one of " + ", ".join(CLIP_OPTIONS))
        require(is_number(clip_factor) and clip_factor > 0, "clip_factor", clip_factor, "a number above 0")
        skip = skip_update_on_spike
        require(isinstance(skip, bool), "skip_update_on_spike", skip, "true or false")
        super().__init__(max_grad_norm)
        self.alpha = alpha
        self.z_thresh = z_thresh
        self.eps = eps
        self.warmup_steps = warmup_steps
        self.mode = mode
        self.clip_option = clip_option
        self.clip_factor = clip_factor
        self.skip_update_on_spike = skip_update_on_spike

    def initial_state(self, like: Tensor) -> State:
        """Return a zero count, mean and variance."""
        zero = torch.zeros_like(like)
        return {"count": torch.zeros_like(like, dtype=torch.int64), "mean": zero, "var": zero.clone()}

    def xi(self, z: Tensor) -> Tensor:
        """Return how many standard deviations above the mean a spike of z-score `z` may keep (section 3.3)."""
        option = "max" if self.mode == "percentile" else self.clip_option
        if option == "mean":
            return torch.zeros_like(z)
        if option == "max":
            return torch.full_like(z, self.z_thresh)
        return self.z_thresh**2 / z

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the target of a spike, infinity otherwise, and the updated statistics."""
        count, mean, var = state["count"], state["mean"], state["var"]
        std = var.sqrt()
        warm = count >= self.warmup_steps
        z = (norm - mean) / (std + self.eps)
        spike = warm & (z > self.z_thresh)

        target = mean + self.xi(z) * std
        if self.mode == "zscore" and self.clip_option == "adaptive_scaling":
            target = target * self.clip_factor
        kept = torch.where(spike, target, norm)
        # After warm-up the weight is 1 - alpha; within it 1/n, and the variance keeps the population's value.
        n = (count + 1).to(norm.dtype)
        ema_mean = self.alpha * mean + (1 - self.alpha) * kept
        ema_var = self.alpha * var + (1 - self.alpha) * (kept - ema_mean).square()
        first_mean = mean + (norm - mean) / n
        first_var = var + ((norm - mean) * (norm - first_mean) - var) / n
        new_mean = torch.where(warm, ema_mean, first_mean)
        new_var = torch.where(warm, ema_var, first_var)
        if self.skip_update_on_spike:
            new_mean, new_var = torch.where(spike, mean, new_mean), torch.where(spike, var, new_var)

        return Decision(
            target=torch.where(spike, target, torch.inf),
            state={"count": count + 1, "mean": new_mean, "var": new_var},
            telemetry={
                "z": torch.where(warm, z, torch.nan),
                "mean": mean.clone(),
                "std": std,
                "spike": spike.to(norm.dtype),
            },
        )
