"""The simplest rules: clipping to a fixed norm, and no clipping."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import Decision, State


class FixedNorm(ClippingStrategy):
    """Scale gradients of a norm above `max_norm` down to it (Pascanu et al., arXiv 1211.5063, algorithm 1).

    Args:
        max_norm: threshold c in `g <- g min(1, c / ||g||)`. Default 1.0, the fixed baseline of the ZClip paper.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.
    """

    def __init__(self, max_norm: float = 1.0, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)
        self.max_norm = positive("max_norm", max_norm)

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the constant target."""
        return Decision(torch.full_like(norm, self.max_norm), state)


class NoClipping(ClippingStrategy):
    """Record the norm of the gradients and leave them unchanged.

    Args:
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.
    """

    def __init__(self, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return a target of infinity."""
        return Decision(torch.full_like(norm, torch.inf), state)
