"""No clipping: the baseline, with its norms measured like everyone's."""

import torch
from torch import Tensor

from zclip.base import ClippingStrategy, Decision, State


class NoClipping(ClippingStrategy):
    """Leave the gradients as they are and record their norm."""

    def __init__(self) -> None:
        super().__init__()

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return a target of infinity."""
        return Decision(torch.full_like(norm, torch.inf), state)
