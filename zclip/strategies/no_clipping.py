"""No clipping: the baseline, which records the same norms as the other strategies."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import ClippingStrategy, Policy
from zclip.decision import Decision, State


class NoClipping(ClippingStrategy):
    """Record the norm of the gradients and leave them unchanged.

    Args:
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ArgumentError: an argument is out of its range.
    """

    def __init__(self, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return a target of infinity."""
        return Decision(torch.full_like(norm, torch.inf), state)
