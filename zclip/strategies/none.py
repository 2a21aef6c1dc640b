"""No clipping: the baseline, with its norms measured like everyone's."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import ClippingStrategy, Decision, Policy, State


class NoClipping(ClippingStrategy):
    """Leave the gradients as they are and record their norm.

    Args:
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return a target of infinity."""
        return Decision(torch.full_like(norm, torch.inf), state)
