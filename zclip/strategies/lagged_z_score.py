"""LaggedZScore: clip a norm that is an outlier among norms of long before."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import integer, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import Decision, State
from zclip.saved_state import check_history

#: Lower bound on the standard deviation, relative to the mean.
MIN_RELATIVE_STD = 1e-4


class LaggedZScore(ClippingStrategy):
    """Clip to mean + z_thresh std of the norms of steps T - lag - window to T - lag - 1.

    A spike often has a run-up of tens of steps in which norms rise. Statistics of the latest steps rise with it. These
    lag behind, as in MosaicML's LLM Foundry, whose outlier detection compares with a delayed moving average.

    Norms enter before clipping, so after a lasting change of their level the rule follows within `lag + window` steps.
    At most half of the norms so far are left out, so at first the older half counts. While the mean is 0, nothing but
    `max_grad_norm` clips.

    Args:
        z_thresh: number of standard deviations above the mean to which norms are clipped, > 0. Default 3.0.
        lag: number of latest norms that are left out, >= 0. Default 500.
        window: number of norms before these in the statistics, >= 2. Default 500.
        warmup_steps: number of first norms that are not clipped by the rule, >= 4. Default 100.
        max_grad_norm: upper bound on the norm after clipping, > 0; it does not affect the statistics. Default `None`.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    While norms rise slowly and for long, the bound stays behind, and nearly every step is clipped: with noise of 10 %,
    seven of ten where norms rise by 0.05 % a step, and all where they rise by 0.1 %.

    Telemetry, in addition to that of `ClippingStrategy`: `z` (NaN during the warm-up and while the mean is 0), `mean`
    and `std` of the norms that the step is compared with, and `spike` (z above z_thresh), 0 or 1.
    """

    nonnegative = ("history", "count")

    def __init__(
        self,
        z_thresh: float = 3.0,
        lag: int = 500,
        window: int = 500,
        warmup_steps: int = 100,
        max_grad_norm: float | None = None,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(max_grad_norm, **policy)
        self.z_thresh = positive("z_thresh", z_thresh)
        self.lag = integer("lag", lag, minimum=0)
        self.window = integer("window", window, minimum=2)
        self.warmup_steps = integer("warmup_steps", warmup_steps, minimum=4)

    def initial_state(self, like: Tensor) -> State:
        """Return an empty history; unused entries hold infinity."""
        history = like.new_full((self.lag + self.window,), torch.inf)
        return {"history": history, "count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the history has as many norms as its count says."""
        check_history(type(self).__name__, state["history"], int(state["count"]))

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the bound of this step, infinity where the rule does not clip, and the history with its norm."""
        history, count = state["history"], state["count"]
        slots = torch.arange(history.numel(), device=norm.device)
        age = (count - 1 - slots) % history.numel() + 1  # 1 for the norm of the step before
        compared = (age <= count) & (age > (count // 2).clamp(max=self.lag))
        number = compared.sum().clamp(min=1)
        mean = torch.where(compared, history, 0.0).sum() / number
        var = torch.where(compared, history - mean, 0.0).square().sum() / number
        std = var.sqrt().maximum(MIN_RELATIVE_STD * mean)
        warm = (count >= self.warmup_steps) & (mean > 0)
        target = torch.where(warm, mean + self.z_thresh * std, torch.inf)
        z = torch.where(warm, (norm - mean) / std, torch.nan)
        new = {"history": torch.where(slots == count % history.numel(), norm, history), "count": count + 1}
        return Decision(target, new, {"z": z, "mean": mean, "std": std, "spike": norm > target})
