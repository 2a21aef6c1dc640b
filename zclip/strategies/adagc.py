"""AdaGC: each gradient tensor is clipped to a multiple of the moving average of its own norm."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import decay, integer, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, GradStats, State


class AdaGC(ClippingStrategy):
    """Adaptive clipping of each tensor against its own history (Wang et al., arXiv 2502.11034, algorithm 1).

    With g_i the gradient of tensor i, after the warm-up::

        h_i = min(lambda_rel gamma_i / ||g_i||, 1),    gamma_i <- beta gamma_i + (1 - beta) ||h_i g_i||

    and during the warm-up, with the global norm x::

        h = min(lambda_abs / x, 1),                    gamma_i <- min(gamma_i, ||h g_i||).

    The average of a tensor does not change on a step without a gradient or with a zero one.

    Args:
        lambda_rel: upper bound on a tensor's norm, as a multiple of its average, > 0. Default 1.05.
        beta: smoothing factor of the average, 0 <= beta < 1. Default 0.98.
        warmup_steps: number of first steps, which clip the global norm instead, >= 1. Default 100.
        lambda_abs: upper bound on the global norm during the warm-up, > 0. Default 1.0.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Telemetry, in addition to that of `ClippingStrategy`: `clipped_tensors`, their number.
    """

    per_tensor = True
    nonnegative = ("count", "gamma")

    def __init__(
        self,
        lambda_rel: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
        lambda_abs: float = 1.0,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(None, **policy)
        self.lambda_rel = positive("lambda_rel", lambda_rel)
        self.beta = decay("beta", beta)
        self.warmup_steps = integer("warmup_steps", warmup_steps)
        self.lambda_abs = positive("lambda_abs", lambda_abs)

    def initial_state(self, like: Tensor) -> State:
        """Return averages of infinity, which the minimum of the first step replaces."""
        count = torch.zeros((), dtype=torch.int64, device=like.device)
        return {"count": count, "gamma": torch.full_like(like, torch.inf)}

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return one coefficient for each tensor."""
        norms, gamma = stats.norms, state["gamma"]
        warm = state["count"] >= self.warmup_steps
        global_coefficient = (self.lambda_abs / stats.norm).clamp(max=1).expand_as(norms)
        coefficients = torch.where(warm, (self.lambda_rel * gamma / norms).clamp(max=1), global_coefficient)
        coefficients = torch.where(norms > 0, coefficients, 1.0)
        clipped_norms = norms * coefficients
        clipped_tensors = stats.all_reduce_sum((coefficients < 1).sum())
        ema = self.beta * gamma + (1 - self.beta) * clipped_norms
        average = torch.where(warm & gamma.isfinite(), ema, gamma.minimum(clipped_norms))
        return ClipResult(
            coefficients,
            clipped_norm=stats.all_reduce_sum(clipped_norms.square().sum()).sqrt(),
            clipped=clipped_tensors > 0,
            state={"count": state["count"] + 1, "gamma": torch.where(norms > 0, average, gamma)},
            telemetry={"clipped_tensors": clipped_tensors},
        )
