"""ZClip: clip a norm that is an outlier among the norms of the steps before it."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import ClippingStrategy, Decision, Policy, State, is_count, is_number, require

MODES = ("zscore", "percentile")
CLIP_OPTIONS = ("adaptive_scaling", "mean", "max")

#: Standard deviation below which norms count as constant, relative to the mean.
LEAST_RELATIVE_STD = 1e-4
#: Share of spikes in a block that means the level has risen.
LOCKED_IN_SHARE = 0.75
#: A block's mean over those of two blocks in a row after it that means the level has fallen, if also
FALL = 2.0
#: the standard deviation is so many times the block's.
STALE_STD_RATIO = 4.0


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

    Two rules go beyond the paper, for cases in which its statistics stop describing the norms.

    *No lock-in.* The statistics take clipped norms, so after a lasting rise of the norm they may never catch up, and
    every step would be clipped for ever; after a lasting fall they take hundreds of steps to forget the old level.
    After each block of `recovery_window` norms, the mean and variance start anew from the block's raw norms if

    - three quarters of them were spikes (a rise), or
    - their mean and that of the block before are both below half of a block shortly before these (or of the warm-up),
      and the standard deviation is above four times theirs (a fall).

    Neither happens by chance to independent norms without heavy tails. If a share p of the steps are spikes, three
    quarters of 40 are with probability below 1e-18 for p = 0.12 (z_thresh 2.0 in the paper) and below 1e-6 for p = 0.36
    (z_thresh 1.5); and the variance of 40 normal norms is a sixteenth of the true one with probability below 1e-15.
    Smaller windows have less of this protection. A decline to less than half within a few blocks, as is common early in
    training, counts as a fall, and so does an outlier in the warm-up. Where neither holds, the trace is the published
    one.

    *Near-constant norms.* In z and in the target the standard deviation is taken as at least 1e-4 of the mean, and
    nothing is a spike while the mean is 0.

    Args:
        alpha: smoothing factor, 0 <= alpha < 1. Default 0.97.
        z_thresh: z-score above which a step is a spike, > 0. Default 2.5.
        max_grad_norm: bound on the norm after clipping, and the only clipping during warm-up. It does not
            enter the statistics. Default `None`: no bound.
        eps: added to the standard deviation in z. Default 1e-6.
        warmup_steps: norms that initialise the statistics, >= 1. Default 25.
        mode: "zscore", or "percentile", which is "zscore" with the option "max". Default "zscore".
        clip_option: "adaptive_scaling" (default), "mean" or "max"; ignored by mode="percentile".
        clip_factor: multiplies the target of "adaptive_scaling"; below 1 clips spikes harder. Above 1 the target may
            be above the norm; it enters the statistics all the same, as it does in the published package. Default 1.0.
        skip_update_on_spike: leave the statistics alone on a spike. Default False.
        recovery_window: norms in a block of the first rule, >= 8. Default 40; `None` switches the rule off.
        on_nonfinite: what a norm that is NaN or infinite does besides staying out of the statistics: "skip" (default)
            the optimizer's step, set the gradients to "zero", or "raise"; see `ClippingStrategy`.
        max_consecutive_nonfinite: so many of those in a row raise `FloatingPointError`. Default 20; `None`: never.

    Raises:
        ValueError: an argument is out of its range; the message names it, its value and what is allowed.

    Telemetry, besides that of every strategy (see `ClippingStrategy`): `z` (NaN during warm-up), `mean` and `std`
    before the step, `spike` (its z-score was above z_thresh) and `recovered` (the statistics started anew), 0 or 1.
    """

    version = 2  # 1 had the last block only

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
        recovery_window: int | None = 40,
        **policy: Unpack[Policy],
    ) -> None:
        require(is_number(alpha) and 0 <= alpha < 1, "alpha", alpha, "a number from 0 to below 1")
        require(is_number(z_thresh) and z_thresh > 0, "z_thresh", z_thresh, "a number above 0")
        require(is_number(eps) and eps > 0, "eps", eps, "a number above 0")
        require(is_count(warmup_steps), "warmup_steps", warmup_steps, "an integer from 1")
        require(mode in MODES, "mode", mode, "one of " + ", ".join(MODES))
        require(clip_option in CLIP_OPTIONS, "clip_option", clip_option, "one of " + ", ".join(CLIP_OPTIONS))
        require(is_number(clip_factor) and clip_factor > 0, "clip_factor", clip_factor, "a number above 0")
        skip = skip_update_on_spike
        require(isinstance(skip, bool), "skip_update_on_spike", skip, "true or false")
        window = recovery_window
        valid = window is None or is_count(window, 8)
        require(valid, "recovery_window", window, "an integer from 8, or null to switch recovery off")
        super().__init__(max_grad_norm, **policy)
        self.alpha = alpha
        self.z_thresh = z_thresh
        self.eps = eps
        self.warmup_steps = warmup_steps
        self.mode = mode
        self.clip_option = clip_option
        self.clip_factor = clip_factor
        self.skip_update_on_spike = skip_update_on_spike
        self.recovery_window = recovery_window

    def initial_state(self, like: Tensor) -> State:
        """Return zero counts, means and variances, of all norms and of the current block; means of the last blocks."""
        counts = {key: torch.zeros_like(like, dtype=torch.int64) for key in ("count", "block_count", "block_spikes")}
        moments = {key: torch.zeros_like(like) for key in ("mean", "var", "block_mean", "block_var")}
        return counts | moments | {"blocks": like.new_zeros(3)}

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
        std = var.sqrt().maximum(LEAST_RELATIVE_STD * mean)
        warm = count >= self.warmup_steps
        z = (norm - mean) / (std + self.eps)
        spike = warm & (z > self.z_thresh) & (mean > 0)

        target = mean + self.xi(z) * std
        if self.mode == "zscore" and self.clip_option == "adaptive_scaling":
            target = target * self.clip_factor
        kept = torch.where(spike, target, norm)
        ema_mean = self.alpha * mean + (1 - self.alpha) * kept
        ema_var = self.alpha * var + (1 - self.alpha) * (kept - ema_mean).square()
        if self.skip_update_on_spike:
            ema_mean, ema_var = torch.where(spike, mean, ema_mean), torch.where(spike, var, ema_var)
        first_mean, first_var = _include(norm, mean, var, count)
        new = {
            "count": count + 1,
            "mean": torch.where(warm, ema_mean, first_mean),
            "var": torch.where(warm, ema_var, first_var),
        }
        block = {key: value for key, value in state.items() if key not in new}
        recovered = torch.zeros_like(spike)
        if self.recovery_window is not None:
            recovered = self._recover(self.recovery_window, norm, warm, spike, new, block)
        return Decision(
            target=torch.where(spike, target, torch.inf),
            state=new | block,
            telemetry={
                "z": torch.where(warm, z, torch.nan),
                "mean": mean.clone(),
                "std": std,
                "spike": spike,
                "recovered": recovered,
            },
        )

    @staticmethod
    def _recover(window: int, norm: Tensor, warm: Tensor, spike: Tensor, new: State, block: State) -> Tensor:
        """Take the norm into the block; at its end put the block's statistics into `new` if those are lost."""
        block_mean, block_var = _include(norm, block["block_mean"], block["block_var"], block["block_count"])
        count = block["block_count"] + warm
        spikes = block["block_spikes"] + spike
        ends = count >= window
        stuck = spikes >= LOCKED_IN_SHARE * window
        # A fall that does not last is none; and of the block in which it happens, the own variance may hide it.
        before, *earlier = block["blocks"].unbind()
        fell = torch.stack(earlier).amax() > FALL * block_mean.maximum(before)
        stale = fell & (new["var"] > STALE_STD_RATIO**2 * block_var)
        recovered = ends & (stuck | stale)
        new["mean"] = torch.where(recovered, block_mean, new["mean"])
        new["var"] = torch.where(recovered, block_var, new["var"])
        again, zero = ends | ~warm, torch.zeros_like(block_mean)
        block.update(
            block_count=torch.where(again, 0, count),
            block_spikes=torch.where(again, 0, spikes),
            block_mean=torch.where(again, 0.0, block_mean),
            block_var=torch.where(again, 0.0, block_var),
            blocks=torch.where(ends, torch.stack([block_mean, before, earlier[0]]), block["blocks"]),
        )
        block["blocks"] = torch.where(recovered, torch.stack([block_mean, zero, zero]), block["blocks"])
        block["blocks"] = torch.where(warm, block["blocks"], torch.stack([new["mean"], zero, zero]))
        return recovered


def _include(norm: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of `count` norms and one more (Welford's update)."""
    n = (count + 1).to(norm.dtype)
    new_mean = mean + (norm - mean) / n
    return new_mean, var + ((norm - mean) * (norm - new_mean) - var) / n
