"""Clipping to a fixed norm, the most common rule."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import is_number, require
from zclip.base import ClippingStrategy, Policy
from zclip.decision import Decision, State


class FixedNorm(ClippingStrategy):
    """Scale gradients of a norm above `max_norm` down to it (Pascanu et al., arXiv 1211.5063, algorithm 1).

    Args:
        max_norm: threshold c in g <- g min(1, c / ||g||). Default 1.0, the fixed baseline of the ZClip paper.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ArgumentError: an argument is out of its range.
    """

    def __init__(self, max_norm: float = 1.0, **policy: Unpack[Policy]) -> None:
        require(is_number(max_norm) and max_norm > 0, "max_norm", max_norm, "a number above 0")
        super().__init__(None, **policy)
        self.max_norm = max_norm

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the constant target."""
        return Decision(torch.full_like(norm, self.max_norm), state)
