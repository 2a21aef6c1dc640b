"""UpdateBrake: lower the learning rate when updates grow, and release it slowly."""

import torch
from torch import Tensor

from zclip.arguments import integer, is_number, positive, require
from zclip.decision import State
from zclip.saved_state import check_history, refuse
from zclip.updates.base import UpdateDecision, UpdateRule
from zclip.updates.bounds import robust_bound


class UpdateBrake(UpdateRule):
    """Bound the update as `UpdateClip` does, but remember the scale, and let it return to 1 slowly.

    An experiment of this library: there is no evidence for it yet. When gradients shrink, Adam's second moment lags
    behind them, and the effective step grows until it is unstable (arXiv 2506.04805). A rule that forgets its scale
    after each step holds the run at that edge. This one remembers it, as s in (0, 1]:

        log s <- release * log s
        x = log(s * norm of the update)
        if x > bound:  log s <- log s + bound - x

    The step is taken at the rate `lr * s`. The bound is over x of the steps before, as they were taken: see
    `zclip.updates.bounds.robust_bound`. The first 16 steps have none.

    Args:
        release: factor on log s in each step, from 0 to below 1. Default 0.999; 0 forgets at once.
        sigmas: robust standard deviations above the median of the last `window` steps, > 0. Default 5.0.
        window: number of these steps, >= 16. Default 128.
        past_sigmas: the same above the median of the `past_window` steps before the last `lag`, > 0. Default 3.0.
        lag: number of latest steps that are left out there, >= 1. Default 500.
        past_window: number of steps there, >= 2. Default 500.
    """

    nonnegative = ("count",)

    def __init__(
        self,
        release: float = 0.999,
        sigmas: float = 5.0,
        window: int = 128,
        past_sigmas: float = 3.0,
        lag: int = 500,
        past_window: int = 500,
    ) -> None:
        super().__init__()
        self.release = require(
            is_number(release) and 0 <= release < 1, "release", release, "a number from 0 to below 1"
        )
        self.sigmas = positive("sigmas", sigmas)
        self.window = integer("window", window, minimum=16)
        self.past_sigmas = positive("past_sigmas", past_sigmas)
        self.lag = integer("lag", lag)
        self.past_window = integer("past_window", past_window, minimum=2)

    def initial_state(self, like: Tensor) -> State:
        """Return a scale of 1, and an empty history of log norms; unused entries hold infinity."""
        history = like.new_full((max(self.window, self.lag + self.past_window),), torch.inf)
        count = torch.zeros((), dtype=torch.int64, device=like.device)
        return {"log_scale": like.clone(), "history": history, "count": count}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the history has as many norms as its count says, and the scale is at most 1."""
        check_history(type(self).__name__, state["history"], int(state["count"]))
        if state["log_scale"] > 0:
            refuse(type(self).__name__, "state.log_scale", state["log_scale"], "at most 0")

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Release the scale, lower it if the update is above the bound, and remember both."""
        history, count = state["history"], state["count"]
        log_scale = self.release * state["log_scale"]
        x = log_scale + norm.log()
        bound = robust_bound(
            history,
            count,
            sigmas=self.sigmas,
            window=self.window,
            past_sigmas=self.past_sigmas,
            lag=self.lag,
            past_window=self.past_window,
        )
        clipped = x > bound
        taken = torch.minimum(x, bound)
        log_scale = log_scale + (taken - x)
        here = torch.arange(history.numel(), device=norm.device) == count % history.numel()
        new = {"log_scale": log_scale, "history": torch.where(here, taken, history), "count": count + 1}
        return UpdateDecision(log_scale.exp(), clipped, bound.exp(), new)
