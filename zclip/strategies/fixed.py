"""The fixed threshold: what nearly everybody trains with."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import ClippingStrategy, Decision, Policy, State, is_number, require


class FixedNorm(ClippingStrategy):
    """Scale gradients of a norm above `max_norm` down to it (Pascanu et al., arXiv 1211.5063, algorithm 1).

    Args:
        max_norm: the threshold c in g <- g min(1, c / ||g||). Default 1.0, the paper's fixed baseline.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: `max_norm` is not above 0.
    """

    def __init__(self, max_norm: float = 1.0, **policy: Unpack[Policy]) -> None:
        require(is_number(max_norm) and max_norm > 0, "max_norm", max_norm, "a number above 0")
        super().__init__(None, **policy)
        self.max_norm = max_norm

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the constant target."""
        return Decision(torch.full_like(norm, self.max_norm), state)
