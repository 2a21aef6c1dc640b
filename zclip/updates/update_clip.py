"""UpdateClip: clip an update whose norm is an outlier among those of the last steps."""

import torch
from torch import Tensor

from zclip.arguments import integer, positive
from zclip.decision import State
from zclip.saved_state import check_history
from zclip.updates.base import UpdateDecision, UpdateRule

#: Lower bound on the standard deviation, as Levanter has it.
MIN_STD = 1e-6


class UpdateClip(UpdateRule):
    """Clip the update to mean + sigmas * std of the norms of the last `window` updates (Levanter's `clip_update_norm`).

    The norms enter before clipping, so a lasting change of their level is followed within a window. No step is clipped
    before `window // 2` norms are known (at least 2). The rule differs from Levanter's in what an update is: there it
    includes the decoupled weight decay, here it does not. Both scale the decay with the update.

    Args:
        sigmas: number of standard deviations above the mean to which norms are clipped, > 0. Default 3.0.
        window: number of norms in the statistics, >= 2. Default 128.
    """

    nonnegative = ("history", "count")

    def __init__(self, sigmas: float = 3.0, window: int = 128) -> None:
        super().__init__()
        self.sigmas = positive("sigmas", sigmas)
        self.window = integer("window", window, minimum=2)

    def initial_state(self, like: Tensor) -> State:
        """Return an empty history; unused entries hold infinity."""
        history = like.new_full((self.window,), torch.inf)
        return {"history": history, "count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the history has as many norms as its count says."""
        check_history(type(self).__name__, state["history"], int(state["count"]))

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Return the scale that brings the norm to the bound, and the history with the norm."""
        history, count = state["history"], state["count"]
        known = history.isfinite()
        number = known.sum().clamp(min=1)
        mean = torch.where(known, history, 0.0).sum() / number
        std = (torch.where(known, history - mean, 0.0).square().sum() / number).sqrt().clamp(min=MIN_STD)
        bound = torch.where(count >= max(2, self.window // 2), mean + self.sigmas * std, torch.inf)
        clipped = norm > bound
        here = torch.arange(self.window, device=norm.device) == count % self.window
        new = {"history": torch.where(here, norm, history), "count": count + 1}
        return UpdateDecision(torch.where(clipped, bound / norm, 1.0), clipped, bound, new)
