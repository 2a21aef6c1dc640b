"""TensorAutoClip: the threshold of each gradient tensor is a percentile of its own latest norms."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import integer, is_number, require
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, GradStats, State, clip_tensors
from zclip.saved_state import refuse


class TensorAutoClip(ClippingStrategy):
    """AutoClip (arXiv 2007.14469, algorithm 1) for each tensor, over a window: a variant of this library.

    The history of a tensor holds its latest norms before clipping, including that of this step, so a lasting change of
    the level is followed within a window. The percentile is interpolated linearly. A tensor is not clipped while its
    history is not full, nor on a step without a gradient or with a zero one, which does not enter the history.

    Args:
        percentile: percentile of a tensor's history, from 0 to 100. Default 95.
        window: number of latest norms in a history, >= 2; takes 8 bytes times the window per tensor. Default 128.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Telemetry, in addition to that of `ClippingStrategy`: `clipped_tensors`, their number.
    """

    per_tensor = True
    nonnegative = ("history", "count")

    def __init__(self, percentile: float = 95.0, window: int = 128, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)
        valid = is_number(percentile) and 0 <= percentile <= 100
        self.percentile = require(valid, "percentile", percentile, "a number from 0 to 100")
        self.window = integer("window", window, minimum=2)

    def initial_state(self, like: Tensor) -> State:
        """Return empty histories, of shape (n, window); unused entries hold infinity."""
        history = like.new_full((*like.shape, self.window), torch.inf)
        return {"history": history, "count": torch.zeros_like(like, dtype=torch.int64)}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless each history has as many norms as its count says."""
        history, count = state["history"], state["count"]
        known = torch.arange(self.window, device=count.device) < count.unsqueeze(-1)
        if not torch.equal(history.isfinite(), known):
            refuse(type(self).__name__, "state.history", history, "finite as far as count says, and inf behind")

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return one coefficient for each tensor."""
        norms, history, count = stats.norms, state["history"], state["count"]
        present = norms > 0
        slot = (count % self.window).unsqueeze(-1)
        value = torch.where(present.unsqueeze(-1), norms.unsqueeze(-1), history.gather(-1, slot))
        history = history.scatter(-1, slot, value)
        count = count + present
        clips = present & (count >= self.window) & self._outranks(norms, history)
        rows = clips.nonzero().flatten() if clips.is_cpu else slice(None)  # reading it elsewhere waits for the device
        coefficients = torch.ones_like(norms)
        coefficients[rows] = (self._target(history[rows]) / norms[rows]).clamp(max=1)
        coefficients = torch.where(clips, coefficients, 1.0)
        return clip_tensors(stats, coefficients, {"history": history, "count": count})

    @property
    def _rank(self) -> float:
        """The rank of the percentile in a full history, from 0."""
        return (self.window - 1) * (self.percentile / 100)

    def _outranks(self, norms: Tensor, history: Tensor) -> Tensor:
        """Return whether each norm can be above the percentile: more of its history than the rank is below it."""
        return (history < norms.unsqueeze(-1)).sum(-1) > int(self._rank)

    def _target(self, history: Tensor) -> Tensor:
        """Return the percentile of each row; only the end of a row that is nearer to it is sorted."""
        rank = self._rank
        below, above = int(rank), min(int(rank) + 1, self.window - 1)
        if below >= self.window // 2:
            ordered = history.topk(self.window - below).values
            low, high = ordered[..., -1], ordered[..., below - above - 1]
        else:
            ordered = history.topk(above + 1, largest=False).values
            low, high = ordered[..., below], ordered[..., above]
        return low + (high - low) * (rank - below)
