"""GradientStabilizer: each gradient tensor keeps its direction and gets a smoothed norm."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from zclip.arguments import decay, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, GradStats, State


class GradientStabilizer(ClippingStrategy):
    """Replace each tensor's norm by a ratio of its moving moments (Huang et al., arXiv 2502.17055).

    With n the norm of a tensor's gradient g, and t the number of its non-zero gradients up to this step::

        m <- gamma1 m + (1 - gamma1) n,       m^ = m / (1 - gamma1^t)
        v <- gamma2 v + (1 - gamma2) n^2,     v^ = v / (1 - gamma2^t)
        g <- (g / n) m^ / (sqrt(v^) + eps)

    Norms become about 1 at any scale of the gradients, so use it with optimizers that are invariant to that scale, such
    as Adam. It scales up as well as down; its telemetry counts a step as clipped if the global norm became smaller.
    The moments of a tensor do not change on a step without a gradient or with a zero one.

    Args:
        gamma1: decay of the first moment, 0 <= gamma1 < 1. Default 0.7.
        gamma2: decay of the second moment, 0 <= gamma2 < 1. Default 0.9.
        eps: added to the root of the second moment, > 0. Default 1e-8.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.
    """

    per_tensor = True
    nonnegative = ("steps", "m", "v")

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)
        self.gamma1 = decay("gamma1", gamma1)
        self.gamma2 = decay("gamma2", gamma2)
        self.eps = positive("eps", eps)

    def initial_state(self, like: Tensor) -> State:
        """Return zero moments, and for each tensor the number of steps for their bias correction."""
        return {"steps": torch.zeros_like(like), "m": torch.zeros_like(like), "v": torch.zeros_like(like)}

    def adapt_state(self, state: State, config: Mapping[str, Any]) -> State:
        """Return moments of other decays with the same bias-corrected values."""
        steps = state["steps"].clamp(min=1)  # moments are 0 before
        before1, before2 = (decay(key, config.get(key, getattr(self, key))) for key in ("gamma1", "gamma2"))
        return {
            "steps": state["steps"],
            "m": state["m"] * ((1 - self.gamma1**steps) / (1 - before1**steps)),
            "v": state["v"] * ((1 - self.gamma2**steps) / (1 - before2**steps)),
        }

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return one coefficient for each tensor."""
        norms = stats.norms
        steps = state["steps"] + 1
        m = self.gamma1 * state["m"] + (1 - self.gamma1) * norms
        v = self.gamma2 * state["v"] + (1 - self.gamma2) * norms.square()
        smoothed = (m / (1 - self.gamma1**steps)) / ((v / (1 - self.gamma2**steps)).sqrt() + self.eps)
        nonzero = norms > 0
        largest = torch.finfo(torch.float32).max  # gradients are multiplied in float32
        coefficients = torch.where(nonzero, (smoothed / norms).clamp(max=largest), 1.0)
        clipped_norm = stats.all_reduce_sum((norms * coefficients).square().sum()).sqrt()
        new = {"steps": steps, "m": m, "v": v}
        return ClipResult(
            coefficients,
            clipped_norm=clipped_norm,
            clipped=clipped_norm < stats.norm,
            state={key: torch.where(nonzero, value, state[key]) for key, value in new.items()},
        )
