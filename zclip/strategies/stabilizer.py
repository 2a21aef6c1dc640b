"""GradientStabilizer: the direction of each gradient is kept, its length replaced by a smoothed one."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import Clipping, ClippingStrategy, Measured, Policy, State, is_number, require


class GradientStabilizer(ClippingStrategy):
    """Replace each tensor's norm by a ratio of its moving moments (Huang et al., arXiv 2502.17055).

    With n the norm of a tensor's gradient g at its step t, counted from 1,

        m <- gamma1 m + (1 - gamma1) n,       m^ = m / (1 - gamma1^t)
        v <- gamma2 v + (1 - gamma2) n^2,     v^ = v / (1 - gamma2^t)
        g <- (g / n) m^ / (sqrt(v^) + eps)

    Norms become about 1 whatever they were, so this is meant for optimizers that do not mind the scale of
    gradients, such as Adam. It scales up as well as down: its telemetry calls a step clipped when the global norm
    became smaller. A tensor without a gradient, or with a zero one, keeps its moments.

    Args:
        gamma1: decay of the first moment, 0 <= gamma1 < 1. Default 0.7.
        gamma2: decay of the second moment, 0 <= gamma2 < 1. Default 0.9.
        eps: added to the root of the second moment. Default 1e-8.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: an argument is out of its range.
    """

    per_tensor = True

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8, **policy: Unpack[Policy]) -> None:
        require(is_number(gamma1) and 0 <= gamma1 < 1, "gamma1", gamma1, "a number from 0 to below 1")
        require(is_number(gamma2) and 0 <= gamma2 < 1, "gamma2", gamma2, "a number from 0 to below 1")
        require(is_number(eps) and eps > 0, "eps", eps, "a number above 0")
        super().__init__(None, **policy)
        self.gamma1 = gamma1
        self.gamma2 = gamma2
        self.eps = eps

    def initial_state(self, like: Tensor) -> State:
        """Return zero moments and the counts of steps for their bias correction."""
        return {"steps": torch.zeros_like(like), "m": torch.zeros_like(like), "v": torch.zeros_like(like)}

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Return one coefficient for each tensor."""
        norms = measured.norms
        steps = state["steps"] + 1
        m = self.gamma1 * state["m"] + (1 - self.gamma1) * norms
        v = self.gamma2 * state["v"] + (1 - self.gamma2) * norms.square()
        length = (m / (1 - self.gamma1**steps)) / ((v / (1 - self.gamma2**steps)).sqrt() + self.eps)
        moved = norms > 0
        coefficients = torch.where(moved, length / norms, 1.0)
        kept = measured.everywhere((norms * coefficients).square().sum()).sqrt()
        new = {"steps": steps, "m": m, "v": v}
        return Clipping(
            coefficients,
            clipped_norm=kept,
            clipped=kept < measured.norm,
            state={key: torch.where(moved, value, state[key]) for key, value in new.items()},
        )
