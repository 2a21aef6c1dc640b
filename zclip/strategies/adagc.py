"""AdaGC: a norm is clipped to a multiple of its own moving average, for each gradient tensor or for all together."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from zclip.arguments import decay, integer, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, GradStats, State, clip_tensors
from zclip.saved_state import refuse, same

#: The level of a norm has risen if this fraction of a block is clipped.
LOCK_IN_FRACTION = 0.75


class AdaGC(ClippingStrategy):
    """Adaptive clipping of each tensor against its own history (Wang et al., arXiv 2502.11034, algorithm 1).

    With g_i the gradient of tensor i, after the warm-up::

        h_i = min(lambda_rel gamma_i / ||g_i||, 1),    gamma_i <- beta gamma_i + (1 - beta) ||h_i g_i||

    and during the warm-up, with the global norm x::

        h = min(lambda_abs / x, 1),                    gamma_i <- min(gamma_i, ||h g_i||).

    The average of a tensor does not change on a step without a gradient or with a zero one.

    *Recovery* is a rule of this library, off by default. The average starts from the minimum of the warm-up, and takes
    in clipped norms: it can grow by a factor of 1 + (1 - beta) (lambda_rel - 1) in a step at most, which is 1.0004 by
    default. A tensor whose norms are above is clipped in every step until then. With `recovery_window`, the average is
    reset to the mean of the unclipped norms of a block if three quarters of the block were clipped.

    Args:
        lambda_rel: upper bound on a tensor's norm, as a multiple of its average, > 0. Default 1.04, that of the paper's
            second version; the first has 1.05.
        beta: smoothing factor of the average, 0 <= beta < 1. Default 0.99; the first version has 0.98.
        warmup_steps: number of first steps, which clip the global norm instead, >= 1. Default 100.
        lambda_abs: upper bound on the global norm during the warm-up, > 0. Default 1.0.
        recovery_window: number of a tensor's norms in a block of the recovery rule, >= 8. Default `None`: no recovery.
            A change starts new blocks.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Telemetry, in addition to that of `ClippingStrategy`: `clipped_tensors`, their number.
    """

    version = 2  # version 1 has no blocks
    per_tensor = True
    nonnegative = ("count", "gamma", "block_count", "block_clips", "block_mean")

    def __init__(
        self,
        lambda_rel: float = 1.04,
        beta: float = 0.99,
        warmup_steps: int = 100,
        lambda_abs: float = 1.0,
        recovery_window: int | None = None,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(None, **policy)
        self.lambda_rel = positive("lambda_rel", lambda_rel)
        self.beta = decay("beta", beta)
        self.warmup_steps = integer("warmup_steps", warmup_steps)
        self.lambda_abs = positive("lambda_abs", lambda_abs)
        self.recovery_window = integer("recovery_window", recovery_window, minimum=8, null="to switch recovery off")

    def initial_state(self, like: Tensor) -> State:
        """Return averages of infinity, which the minimum of the first step replaces, and empty blocks."""
        return {
            "count": torch.zeros((), dtype=torch.int64, device=like.device),
            "gamma": torch.full_like(like, torch.inf),
            "block_count": torch.zeros_like(like, dtype=torch.int64),
            "block_clips": torch.zeros_like(like, dtype=torch.int64),
            "block_mean": torch.zeros_like(like),
        }

    def adapt_state(self, state: State, config: Mapping[str, Any]) -> State:
        """Start new blocks, if they are of another length now."""
        if same(self.recovery_window, config.get("recovery_window", self.recovery_window)):
            return state
        return {key: torch.zeros_like(v) if key.startswith("block") else v for key, v in state.items()}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` unless the counts of blocks are below their length."""
        count, clips = state["block_count"], state["block_clips"]
        most = self.recovery_window - 1 if self.recovery_window else 0
        if (count > most).any():
            refuse(type(self).__name__, "state.block_count", count, f"integers from 0 to {most}")
        if (clips > count).any():
            refuse(type(self).__name__, "state.block_clips", clips, "integers from 0 to those of block_count")

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return one coefficient for each tensor."""
        coefficients, new = self._rule(stats.norms, stats.norm, state)
        return clip_tensors(stats, coefficients, new)

    def _rule(self, norms: Tensor, global_norm: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the coefficients of norms, and the statistics after them."""
        gamma, present = state["gamma"], norms > 0
        warm = state["count"] >= self.warmup_steps
        global_coefficient = (self.lambda_abs / global_norm).clamp(max=1).expand_as(norms)
        coefficients = torch.where(warm, (self.lambda_rel * gamma / norms).clamp(max=1), global_coefficient)
        coefficients = torch.where(present, coefficients, 1.0)
        clipped_norms = norms * coefficients
        ema = self.beta * gamma + (1 - self.beta) * clipped_norms
        average = torch.where(warm & gamma.isfinite(), ema, gamma.minimum(clipped_norms))
        new = state | {"count": state["count"] + 1, "gamma": torch.where(present, average, gamma)}
        if self.recovery_window is not None:
            self._recover(self.recovery_window, norms, warm & present, coefficients < 1, new)
        return coefficients, new

    @staticmethod
    def _recover(window: int, norms: Tensor, counts: Tensor, clipped: Tensor, new: State) -> None:
        """Add norms to their blocks; at the end of a block that was clipped, set `gamma` in `new` to its mean."""
        count, clips = new["block_count"] + counts, new["block_clips"] + (counts & clipped)
        mean = new["block_mean"] + torch.where(counts, (norms - new["block_mean"]) / count.clamp(min=1), 0.0)
        ends = count >= window
        new["gamma"] = torch.where(ends & (clips >= LOCK_IN_FRACTION * window), mean, new["gamma"])
        new["block_count"], new["block_clips"] = torch.where(ends, 0, count), torch.where(ends, 0, clips)
        new["block_mean"] = torch.where(ends, 0.0, mean)


class GlobalAdaGC(AdaGC):
    """AdaGC over the global norm (after arXiv 2502.11034): one average, one coefficient for all gradients.

    With the global norm x::

        h = min(lambda_rel gamma / x, 1),    gamma <- beta gamma + (1 - beta) h x

    It is a rule over the global norm, so it works where an engine gives only that norm.

    Args:
        lambda_rel, beta, warmup_steps, lambda_abs, recovery_window: those of `AdaGC`, with all gradients as one tensor.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.
    """

    per_tensor = False

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return one coefficient for all gradients."""
        coefficient, new = self._rule(stats.norm, stats.norm, state)
        return ClipResult(coefficient, stats.norm * coefficient, coefficient < 1, new)
