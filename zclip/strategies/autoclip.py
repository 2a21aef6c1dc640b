"""AutoClip: the threshold is a percentile of the norms so far."""

from collections.abc import Collection, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from zclip.arguments import integer, is_number, require
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, Decision, GradStats, State
from zclip.saved_state import check_history, refuse

#: Length of the first buffer of an unlimited history.
HISTORY = 1024


class AutoClip(ClippingStrategy):
    """Clip to a percentile of the history of norms (Seetharaman et al., arXiv 2007.14469, algorithm 1).

    The history holds the norms before clipping, including that of this step, so the first step is never clipped. The
    percentile is interpolated linearly between two norms of the history, of which norms of exactly 0 do not count. In
    the paper they do: the threshold is then 0 once more than a tenth of the norms are, and so is every gradient. A
    history without other norms clips nothing. The ZClip paper does not state the percentile
    of its AutoClip baseline; 10 is the AutoClip paper's recommendation.

    Args:
        percentile: percentile of the history, from 0 to 100. Default 10.
        window: number of latest norms in the history. Default `None`: all norms; the buffer then doubles whenever it is
            full and takes 8 bytes per step.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Telemetry, in addition to that of `ClippingStrategy`: `threshold`, the percentile.
    """

    nonnegative = ("history", "count")

    def __init__(self, percentile: float = 10.0, window: int | None = None, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)
        valid = is_number(percentile) and 0 <= percentile <= 100
        self.percentile = require(valid, "percentile", percentile, "a number from 0 to 100")
        self.window = integer("window", window, null="for the full history")
        self._steps = 0  # upper bound of the count on the device, known without a device sync

    @property
    def resizable(self) -> Collection[str]:  # type: ignore[override]
        """The history, if it is unlimited; `change` may set another window."""
        return () if self.window else ("history",)

    def initial_state(self, like: Tensor) -> State:
        """Return an empty history; unused entries hold infinity, so that sorting moves them to the end."""
        history = like.new_full((self.window or HISTORY,), torch.inf)
        return {"history": history, "count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Enlarge a full history, then clip by the target of `decide`."""
        self._steps += 1
        history = state["history"]
        if self.window is None and self._steps > history.numel():
            with torch.inference_mode(False):  # later steps may be outside of it, and change the history in place
                state["history"] = torch.cat([history, torch.full_like(history, torch.inf)])
        return super().clip(stats, state)

    def load_state_dict(self, state_dict: Mapping[str, Any], override: bool = False) -> None:
        """Restore the history."""
        super().load_state_dict(state_dict, override)
        self._steps = int(self.state["count"]) if self.state else 0

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the history has as many norms as its count says, and no more room than it made."""
        history, count = state["history"], int(state["count"])
        check_history(type(self).__name__, history, count)
        if self.window is None and count > len(history):
            allowed = f"of all {count} norms, of which a window has dropped the first ones"
            refuse(type(self).__name__, "state.history", history, allowed)
        steps = count + int(counters["nonfinite"])  # the buffer doubled whenever it had no room for another step
        if self.window is None and len(history) > max(HISTORY, 2 * steps):
            allowed = f"of {HISTORY} values, or doubled as often as the {steps} steps before needed"
            refuse(type(self).__name__, "state.history", history, allowed)

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Add the norm to the history and return the percentile as the target."""
        history, count = state["history"], state["count"]
        index = count % history.numel()
        history = torch.where(torch.arange(history.numel(), device=norm.device) == index, norm, history)
        count = count + 1
        length, zeros = count.clamp(max=history.numel()), (history == 0).sum()
        rank = (length - zeros - 1).clamp(min=0).to(norm.dtype) * (self.percentile / 100)
        below, above = rank.floor().long(), rank.ceil().long()
        ordered = history.where(history > 0, torch.inf).sort().values
        low, high = ordered.take(below), ordered.take(above)
        target = torch.where(length > zeros, low + (high - low) * (rank - below), torch.inf)
        return Decision(target, {"history": history, "count": count}, {"threshold": target})
