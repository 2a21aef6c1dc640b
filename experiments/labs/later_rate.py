"""A control: a lower learning rate from one step on, as people set it by hand."""

import torch
from torch import Tensor

from zclip.arguments import integer, is_number, require
from zclip.decision import State
from zclip.updates import UpdateDecision, UpdateRule


class LaterRate(UpdateRule):
    """Scale the rate by one factor from a step on, whatever the norms are.

    Args:
        after: number of steps at the rate of the schedule, >= 1.
        scale: factor on the rate of all later steps, above 0 and at most 1.
    """

    nonnegative = ("count",)

    def __init__(self, after: int, scale: float) -> None:
        super().__init__()
        self.after = integer("after", after)
        self.scale = require(is_number(scale) and 0 < scale <= 1, "scale", scale, "a number above 0 and at most 1")

    def initial_state(self, like: Tensor) -> State:
        """Return the number of steps taken."""
        return {"count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Return 1 up to the step, and the scale after it."""
        one, count = torch.ones_like(norm), state["count"]
        scale = torch.where(count >= self.after, self.scale, one)
        return UpdateDecision(scale, scale < 1, torch.full_like(norm, torch.inf), {"count": count + 1})
