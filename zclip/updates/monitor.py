"""UpdateMonitor: measure the norm of the update, and act on nothing."""

import torch
from torch import Tensor

from zclip.decision import State
from zclip.updates.base import UpdateDecision, UpdateRule


class UpdateMonitor(UpdateRule):
    """Record `update_norm` of every step; the learning rate is not touched."""

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Return no scale."""
        return UpdateDecision(None, torch.zeros_like(norm, dtype=torch.bool), torch.full_like(norm, torch.inf), {})
