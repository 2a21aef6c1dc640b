"""AGC of NFNets: the gradient of each unit is clipped relative to the norm of the unit's weights."""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zclip.arguments import positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, GradStats, State
from zclip.norm import Shard, sum_over_ranks


class AGC(ClippingStrategy):
    """Unit-wise adaptive gradient clipping (Brock et al., arXiv 2102.06171, equation 3).

    For unit i of a weight W with gradient G, which is a row, or the whole tensor if it has fewer than two dimensions::

        G_i <- G_i min(1, ratio max(||W_i||, eps) / ||G_i||)

    It has no statistics. It reads the weights as well as the gradients, so it costs more than the strategies based on
    norms. The paper excludes the last linear layer: pass `step` the parameters to clip.

    Args:
        ratio: upper bound on the ratio of gradient norm to weight norm of a unit (lambda in the paper), > 0. Default
            0.01.
        eps: lower bound on the weight norm, so that zero weights can change, > 0. Default 1e-3.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Raises:
        ValueError: in `step`, parameters are flattened by FSDP1, so that their rows are unknown; in `observe`, always.

    Telemetry, in addition to that of `ClippingStrategy`: `clipped_units`, their number.
    """

    needs_gradients = True

    def __init__(self, ratio: float = 0.01, eps: float = 1e-3, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)
        self.ratio = positive("ratio", ratio)
        self.eps = positive("eps", eps)

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return one coefficient for each unit of each tensor."""
        shards = stats.shards
        if not shards and stats.process_group is None:
            raise ValueError("AGC needs weights and gradients: a norm alone is not enough")
        if any(shard.groups and not isinstance(shard.parameter, DTensor) for shard in shards):
            raise ValueError("AGC needs the rows of weights, which FSDP1 flattens: shard with FSDP2 instead")
        coefficients, squares_after, clipped = [], [], []
        for shard, local_gradient in zip(shards, stats.gradients, strict=True):
            parameter = shard.parameter
            if local_gradient is None and not parameter.requires_grad:
                coefficients.append(torch.ones_like(stats.norm))
                squares_after.append(torch.zeros_like(stats.norm))
                clipped.append(torch.zeros_like(stats.norm))
                continue
            weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            gradient = torch.zeros_like(weight) if local_gradient is None else local_gradient
            local_squares = _unit_squares(gradient)
            gradient_norm = _sum_over_ranks(shard, local_squares.clone()).sqrt()
            weight_norm = _sum_over_ranks(shard, _unit_squares(weight)).sqrt()
            coefficient = (self.ratio * weight_norm.clamp(min=self.eps) / gradient_norm).clamp(max=1)
            coefficient = torch.where(gradient_norm > 0, coefficient, 1.0)
            coefficients.append(coefficient)
            squares_after.append((local_squares * coefficient.square()).sum().to(stats.norm))
            clipped.append((coefficient < 1).sum().to(stats.norm))
        clipped_norm = stats.all_reduce_sum(_total(shards, squares_after, stats.norm)).sqrt()
        clipped_units = stats.all_reduce_sum(_total(shards, clipped, stats.norm))
        return ClipResult(coefficients, clipped_norm, clipped_units > 0, state, {"clipped_units": clipped_units})


def _total(shards: Sequence[Shard], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of one 0-dim value for each parameter, maybe none, over the ranks that share it."""
    return sum_over_ranks(shards, torch.stack([*values])).sum() if shards else torch.zeros_like(like)


def _unit_squares(local: Tensor) -> Tensor:
    """Return the sum of squares of each unit, (rows, 1, ...) or 0-dim, in float32 at least."""
    squares = local.detach().to(torch.promote_types(local.dtype, torch.float32)).square()
    return squares.sum() if local.ndim < 2 else squares.sum(dim=tuple(range(1, local.ndim)), keepdim=True)


def _sum_over_ranks(shard: Shard, squares: Tensor) -> Tensor:
    """Return the sums over the ranks that share a unit, computed in place; rows are whole where dim 0 is sharded."""
    parameter = shard.parameter
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            # FSDP2 over tensor parallelism has placements that are not a `Shard` but have its attribute `dim`.
            sharded_dim: int | None = getattr(placement, "dim", None)
            if sharded_dim is not None and (sharded_dim > 0 or squares.ndim == 0):
                dist.all_reduce(squares, group=parameter.device_mesh.get_group(dim))
    return squares
