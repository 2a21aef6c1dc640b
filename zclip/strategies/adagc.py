"""AdaGC: each tensor is clipped to a multiple of its own moving average norm."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import Clipping, ClippingStrategy, Measured, Policy, State, is_count, is_number, require


class AdaGC(ClippingStrategy):
    """Adaptive clipping of each tensor against its own history (Wang et al., arXiv 2502.11034, algorithm 1).

    With g_i the gradient of tensor i, after warm-up

        h_i = min(lambda_rel gamma_i / ||g_i||, 1),    gamma_i <- beta gamma_i + (1 - beta) ||h_i g_i||

    and during it, with the global norm ||g||,

        h = min(lambda_abs / ||g||, 1),                gamma_i <- min(gamma_i, ||h g_i||).

    A tensor without a gradient, or with a zero one, keeps its average.

    Args:
        lambda_rel: multiple of the average a tensor's norm may reach. Default 1.05.
        beta: smoothing factor of the average, 0 <= beta < 1. Default 0.98.
        warmup_steps: steps of global clipping. Default 100.
        lambda_abs: bound on the global norm during them. Default 1.0.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: an argument is out of its range.

    Telemetry, besides that of every strategy: `clipped_tensors`, how many.
    """

    per_tensor = True

    def __init__(
        self,
        lambda_rel: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
        lambda_abs: float = 1.0,
        **policy: Unpack[Policy],
    ) -> None:
        require(is_number(lambda_rel) and lambda_rel > 0, "lambda_rel", lambda_rel, "a number above 0")
        require(is_number(beta) and 0 <= beta < 1, "beta", beta, "a number from 0 to below 1")
        require(is_count(warmup_steps), "warmup_steps", warmup_steps, "an integer from 1")
        require(is_number(lambda_abs) and lambda_abs > 0, "lambda_abs", lambda_abs, "a number above 0")
        super().__init__(None, **policy)
        self.lambda_rel = lambda_rel
        self.beta = beta
        self.warmup_steps = warmup_steps
        self.lambda_abs = lambda_abs

    def initial_state(self, like: Tensor) -> State:
        """Return averages of infinity, which the first minimum replaces."""
        return {
            "count": torch.zeros((), dtype=torch.int64, device=like.device),
            "gamma": torch.full_like(like, torch.inf),
        }

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Return one coefficient for each tensor."""
        norms, gamma = measured.norms, state["gamma"]
        warm = state["count"] >= self.warmup_steps
        first = (self.lambda_abs / measured.norm).clamp(max=1).expand_as(norms)
        coefficients = torch.where(warm, (self.lambda_rel * gamma / norms).clamp(max=1), first)
        coefficients = torch.where(norms > 0, coefficients, 1.0)
        kept = norms * coefficients
        clipped = measured.everywhere((coefficients < 1).sum())
        average = torch.where(warm & gamma.isfinite(), self.beta * gamma + (1 - self.beta) * kept, gamma.minimum(kept))
        return Clipping(
            coefficients,
            clipped_norm=measured.everywhere(kept.square().sum()).sqrt(),
            clipped=clipped > 0,
            state={"count": state["count"] + 1, "gamma": torch.where(norms > 0, average, gamma)},
            telemetry={"clipped_tensors": clipped},
        )
