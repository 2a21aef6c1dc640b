"""ZClip: clip a norm that is an outlier among the norms of the steps before it."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from zclip.arguments import boolean, decay, integer, one_of, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import Decision, State
from zclip.saved_state import refuse, same

MODES = ("zscore", "percentile")
CLIP_OPTIONS = ("adaptive_scaling", "mean", "max")

#: Lower bound on the standard deviation, relative to the mean.
MIN_RELATIVE_STD = 1e-4
#: The level of the norms has risen if this fraction of a block are spikes.
LOCK_IN_FRACTION = 0.75
#: The level has fallen if a block's mean is this multiple of the means of two later consecutive blocks, and
FALL_RATIO = 2.0
#: the standard deviation is this multiple of the last block's.
STALE_STD_RATIO = 4.0


class ZClip(ClippingStrategy):
    """Z-score clipping with exponential moving statistics (arXiv 2504.02507, section 3).

    The mean and the population variance start as those of the first `warmup_steps` norms. Later norms x have a z-score,
    from the statistics of the steps before. If it is above z_thresh, the step is a spike, and its norm is clipped::

        z = (x - mean) / (std + eps)
        clipped norm = mean + xi(z) std,   xi(z) = z_thresh^2 / z   ("adaptive_scaling", the paper's reciprocal)
                                                   0                ("mean")
                                                   z_thresh         ("max", and mode="percentile")

    The norm then enters the statistics: y is the clipped norm of a spike, and x otherwise::

        mean <- alpha mean + (1 - alpha) y
        var  <- alpha var  + (1 - alpha) (y - mean)^2     with the new mean

    Statistics are float64 scalars on the gradients' device; a step makes no device sync.

    Two rules go beyond the paper, for cases in which its statistics no longer describe the norms.

    *Recovery.* The statistics use clipped norms. After a lasting rise of the norm they may never reach the new level,
    and every step is clipped for ever. After a lasting fall they need hundreds of steps to forget the old level. After
    each block of `recovery_window` norms, the mean and variance are reset to those of the block's unclipped norms in

    - a rise, if three quarters of them were spikes.
    - a fall, if the standard deviation is above four times the block's. The block's mean and that of the previous block
      are also below half of the mean of one of the two blocks before these (or of the warm-up).

    Neither happens by chance to independent norms without heavy tails. Let a fraction p of the steps be spikes. Three
    quarters of 40 are spikes with a probability below 1e-18 for p = 0.12 (z_thresh 2.0 in the paper), and below 1e-6
    for p = 0.36 (z_thresh 1.5). The variance of 40 normal norms is a sixteenth of the true one with a probability below
    1e-15. Smaller windows give less of this protection. A decline to less than half within a few blocks, which is
    common early in training, counts as a fall; so does an outlier in the warm-up. Without either, the decisions are
    those of the published package.

    *Near-constant norms.* The standard deviation in z and in the target is at least 1e-4 of the mean. No step is a
    spike while the mean is 0.

    Args:
        alpha: smoothing factor, 0 <= alpha < 1. Default 0.97.
        z_thresh: z-score above which a step is a spike, > 0. Default 2.5.
        max_grad_norm: upper bound on the norm after clipping, > 0, and the only clipping during the warm-up. It does
            not affect the statistics. Default `None`: no bound.
        eps: added to the standard deviation in z, > 0. Default 1e-6.
        warmup_steps: number of norms that initialise the statistics, >= 1. Default 25.
        mode: "zscore", or "percentile", which is "zscore" with the option "max". Default "zscore".
        clip_option: "adaptive_scaling" (default), "mean" or "max"; ignored by mode="percentile".
        clip_factor: factor on the target of "adaptive_scaling", > 0; values below 1 clip spikes harder. With values
            above 1 the target may exceed the norm; it still enters the statistics, as in the published package. Default
            1.0.
        skip_update_on_spike: whether a spike leaves the statistics unchanged. Default False.
        recovery_window: number of norms in a block of the recovery rule, >= 8. Default 40; `None` disables the rule. A
            change starts a new block.
        on_nonfinite: what happens on a norm that is NaN or infinite: "skip" (default) the optimizer's step, set the
            gradients to "zero", or "raise"; see `ClippingStrategy`.
        max_consecutive_nonfinite: number of consecutive such norms that raises `FloatingPointError`. Default 20;
            `None`: never.
        scope: patterns of the names of the parameters to clip, such as `["*.weight", "!embed*"]`, or of the
            optimizer's groups, such as `"group:adamw"`; see `ClippingStrategy`. Default `None`: all.

    Raises:
        ArgumentError: an argument is out of its range; the message names it, its value and what is allowed.

    Telemetry, in addition to that of `ClippingStrategy`: `z` (NaN during the warm-up), `mean` and `std` before the
    step, `spike` (whether z was above z_thresh) and `recovered` (whether the statistics were reset), 0 or 1.
    """

    version = 2  # version 1 has the mean of one block only
    nonnegative = ("count", "block_count", "block_spikes", "mean", "var", "block_mean", "block_var", "blocks")

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
        super().__init__(max_grad_norm, **policy)
        self.alpha = decay("alpha", alpha)
        self.z_thresh = positive("z_thresh", z_thresh)
        self.eps = positive("eps", eps)
        self.warmup_steps = integer("warmup_steps", warmup_steps)
        self.mode = one_of("mode", mode, MODES)
        self.clip_option = one_of("clip_option", clip_option, CLIP_OPTIONS)
        self.clip_factor = positive("clip_factor", clip_factor)
        self.skip_update_on_spike = boolean("skip_update_on_spike", skip_update_on_spike)
        self.recovery_window = integer("recovery_window", recovery_window, minimum=8, null="to switch recovery off")

    def initial_state(self, like: Tensor) -> State:
        """Return zero counts, means and variances of all norms and of the current block; zero means of three blocks."""
        counts = {key: torch.zeros_like(like, dtype=torch.int64) for key in ("count", "block_count", "block_spikes")}
        moments = {key: torch.zeros_like(like) for key in ("mean", "var", "block_mean", "block_var")}
        return counts | moments | {"blocks": like.new_zeros(3)}

    def adapt_state(self, state: State, config: Mapping[str, Any]) -> State:
        """Restart the blocks, if they are of another length now or did not go on without recovery."""
        if same(self.recovery_window, config.get("recovery_window", self.recovery_window)):
            return state
        block = {key: torch.zeros_like(value) for key, value in state.items() if key.startswith("block")}
        block["blocks"][0] = state["mean"]
        return state | block

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the counts of a block are below its length."""
        block_count, block_spikes = int(state["block_count"]), int(state["block_spikes"])
        most = self.recovery_window - 1 if self.recovery_window else 0
        if block_count > most:
            refuse("ZClip", "state.block_count", block_count, f"an integer from 0 to {most}")
        if block_spikes > block_count:
            refuse("ZClip", "state.block_spikes", block_spikes, f"an integer from 0 to block_count={block_count}")

    def xi(self, z: Tensor) -> Tensor:
        """Return the target of a spike of z-score `z`, in standard deviations above the mean (section 3.3)."""
        option = "max" if self.mode == "percentile" else self.clip_option
        if option == "mean":
            return torch.zeros_like(z)
        if option == "max":
            return torch.full_like(z, self.z_thresh)
        return min(self.z_thresh, 1e154) ** 2 / z  # the square of a larger number raises OverflowError

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the target of a spike, infinity otherwise, and the updated statistics."""
        count, mean, var = state["count"], state["mean"], state["var"]
        std = var.sqrt().maximum(MIN_RELATIVE_STD * mean)
        warm = count >= self.warmup_steps
        z = (norm - mean) / (std + self.eps)
        spike = warm & (z > self.z_thresh) & (mean > 0)

        target = mean + self.xi(z) * std
        if self.mode == "zscore" and self.clip_option == "adaptive_scaling":
            # A larger target would make the variance, a square, infinite.
            target = (target * self.clip_factor).clamp(max=torch.finfo(norm.dtype).max ** 0.5)
        clipped = torch.where(spike, target, norm)
        ema_mean = self.alpha * mean + (1 - self.alpha) * clipped
        ema_var = self.alpha * var + (1 - self.alpha) * (clipped - ema_mean).square()
        if self.skip_update_on_spike:
            ema_mean, ema_var = torch.where(spike, mean, ema_mean), torch.where(spike, var, ema_var)
        warmup_mean, warmup_var = _welford(norm, mean, var, count)
        new = {
            "count": count + 1,
            "mean": torch.where(warm, ema_mean, warmup_mean),
            "var": torch.where(warm, ema_var, warmup_var),
        }
        block = {key: value for key, value in state.items() if key not in new}
        recovered = torch.zeros_like(spike)
        if self.recovery_window is not None:
            recovered = self._recover(self.recovery_window, norm, warm, spike, new, block)
        telemetry = {"z": torch.where(warm, z, torch.nan), "mean": mean.clone(), "std": std, "spike": spike}
        return Decision(torch.where(spike, target, torch.inf), new | block, telemetry | {"recovered": recovered})

    @staticmethod
    def _recover(window: int, norm: Tensor, warm: Tensor, spike: Tensor, new: State, block: State) -> Tensor:
        """Add the norm to the block; at its end reset `mean` and `var` in `new` to the block's after a rise or fall.

        Updates `new` and `block`, the other statistics, in place; returns whether `mean` and `var` were reset.
        """
        block_mean, block_var = _welford(norm, block["block_mean"], block["block_var"], block["block_count"])
        count = block["block_count"] + warm
        spikes = block["block_spikes"] + spike
        ends = count >= window
        rise = spikes >= LOCK_IN_FRACTION * window
        # A fall must last two blocks. The variance of the block in which it happens may be too large to show it.
        previous, *earlier = block["blocks"].unbind()
        lower = torch.stack(earlier).amax() > FALL_RATIO * block_mean.maximum(previous)
        fall = lower & (new["var"] > STALE_STD_RATIO**2 * block_var)
        recovered = ends & (rise | fall)
        new["mean"] = torch.where(recovered, block_mean, new["mean"])
        new["var"] = torch.where(recovered, block_var, new["var"])
        restart, zero = ends | ~warm, torch.zeros_like(block_mean)
        block.update(
            block_count=torch.where(restart, 0, count),
            block_spikes=torch.where(restart, 0, spikes),
            block_mean=torch.where(restart, 0.0, block_mean),
            block_var=torch.where(restart, 0.0, block_var),
            blocks=torch.where(ends, torch.stack([block_mean, previous, earlier[0]]), block["blocks"]),
        )
        block["blocks"] = torch.where(recovered, torch.stack([block_mean, zero, zero]), block["blocks"])
        block["blocks"] = torch.where(warm, block["blocks"], torch.stack([new["mean"], zero, zero]))
        return recovered


def _welford(norm: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance after adding a norm to `count` others (Welford's update)."""
    n = (count + 1).to(norm.dtype)
    new_mean = mean + (norm - mean) / n
    return new_mean, var + ((norm - mean) * (norm - new_mean) - var) / n
