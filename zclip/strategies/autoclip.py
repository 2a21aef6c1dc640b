"""AutoClip: the threshold is a percentile of the norms seen so far."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from zclip.base import Clipping, ClippingStrategy, Decision, Measured, Policy, State, is_count, is_number, require


class AutoClip(ClippingStrategy):
    """Clip to a percentile of the history of norms (Seetharaman et al., arXiv 2007.14469, algorithm 1).

    The history holds the raw norms, this step's included, so the first step is never clipped. Between two
    norms of the history the percentile is interpolated linearly. The paper of ZClip does not say which
    percentile it compared with; 10 is the AutoClip paper's recommendation.

    Args:
        percentile: p in [0, 100]. Default 10.
        window: how many of the latest norms count. `None` (default): all of them; the buffer then doubles
            whenever it is full, 8 bytes a step.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: an argument is out of its range.

    Telemetry, besides that of every strategy: `threshold`, the percentile.
    """

    def __init__(self, percentile: float = 10.0, window: int | None = None, **policy: Unpack[Policy]) -> None:
        require(
            is_number(percentile) and 0 <= percentile <= 100,
            "percentile",
            percentile,
            "a number from 0 to 100",
        )
        allowed = "an integer from 1, or null for the full history"
        require(window is None or is_count(window), "window", window, allowed)
        super().__init__(None, **policy)
        self.percentile = percentile
        self.window = window
        self._steps = 0  # bounds the device's count from above without asking it

    def initial_state(self, like: Tensor) -> State:
        """Return an empty history; free places hold infinity, so that sorting moves them to the end."""
        history = like.new_full((self.window or 1024,), torch.inf)
        return {"history": history, "count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Make room in a full history, then decide as usual."""
        self._steps += 1
        history = state["history"]
        if self.window is None and self._steps > history.numel():
            state["history"] = torch.cat([history, torch.full_like(history, torch.inf)])
        return super().clip(measured, state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the history."""
        super().load_state_dict(state_dict)
        self._steps = int(self.state["count"]) if self.state else 0

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Put the norm into the history and return the percentile."""
        history, count = state["history"], state["count"]
        place = count % history.numel()
        history = torch.where(torch.arange(history.numel(), device=norm.device) == place, norm, history)
        count = count + 1
        held = count.clamp(max=history.numel())
        rank = (held - 1).to(norm.dtype) * (self.percentile / 100)
        below, above = rank.floor().long(), rank.ceil().long()
        ordered = history.sort().values
        low, high = ordered.take(below), ordered.take(above)
        target = low + (high - low) * (rank - below)
        return Decision(target, {"history": history, "count": count}, {"threshold": target})
