"""AGC of NFNets: the gradient of each unit is clipped relative to the norm of the unit's weights."""

import math
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

#: Elements of small tensors that are stacked at a time.
BATCH = 1 << 18


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
        zero = torch.zeros_like(stats.norm)
        coefficients = [torch.ones_like(zero)] * len(shards)
        squares_after, clipped = [zero] * len(shards), [zero] * len(shards)
        for members in _batches(stats):
            weights = [_weight(shards[i]) for i in members]
            gradients = [stats.gradients[i] for i in members]
            present = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
            first = shards[members[0]]  # with several members, none is sharded
            local_squares = _unit_squares(_stack(present))
            groups = _groups_of_unit(first, local_squares.ndim == 1)
            gradient_norm = _sum_over_ranks(groups, local_squares.clone()).sqrt()
            weight_norm = _sum_over_ranks(groups, _unit_squares(_stack(weights))).sqrt()
            eps = min(self.eps, torch.finfo(weight_norm.dtype).max)
            coefficient = (self.ratio * weight_norm.clamp(min=eps) / gradient_norm).clamp(max=1)
            coefficient = torch.where(gradient_norm > 0, coefficient, 1.0)
            squares = _sums(local_squares * coefficient.square()).to(zero)
            clips = _sums(coefficient < 1).to(zero) / math.prod(dist.get_world_size(group) for group in groups)
            for i, *values in zip(members, coefficient.unbind(), squares.unbind(), clips.unbind(), strict=True):
                coefficients[i], squares_after[i], clipped[i] = values
        clipped_norm = stats.all_reduce_sum(_total(shards, squares_after, zero)).sqrt()
        clipped_units = stats.all_reduce_sum(_total(shards, clipped, zero))
        return ClipResult(coefficients, clipped_norm, clipped_units > 0, state, {"clipped_units": clipped_units})


def _total(shards: Sequence[Shard], values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of one 0-dim value for each parameter, maybe none, over the ranks that share it."""
    return sum_over_ranks(shards, torch.stack([*values])).sum() if shards else torch.zeros_like(like)


def _batches(stats: GradStats) -> list[list[int]]:
    """Return the indices of the parameters with units to clip; small ones of one kind, not sharded, come together."""
    batches: list[list[int]] = []
    open_batches: dict[tuple[object, ...], list[int]] = {}
    for i, ((parameter, _), gradient) in enumerate(zip(stats.shards, stats.gradients, strict=True)):
        if gradient is None and not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor) or parameter.numel() > BATCH // 2:
            batches.append([i])
            continue
        kind = parameter.shape, parameter.dtype, parameter.device, gradient.dtype if gradient is not None else None
        batch = open_batches.get(kind)
        if batch is None or (len(batch) + 1) * parameter.numel() > BATCH:
            batch = open_batches[kind] = []
            batches.append(batch)
        batch.append(i)
    return batches


def _weight(shard: Shard) -> Tensor:
    return shard.parameter.to_local() if isinstance(shard.parameter, DTensor) else shard.parameter


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one tensor, (k, *shape); a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _unit_squares(stacked: Tensor) -> Tensor:
    """Return the sum of squares of each unit of k tensors, (k, rows, 1, ...) or (k,), in float32 at least."""
    dtype = torch.promote_types(stacked.dtype, torch.float32)
    if stacked.ndim == 1:
        return stacked.detach().to(dtype).square()
    dims = tuple(range(2, stacked.ndim)) or (1,)
    return torch.linalg.vector_norm(stacked.detach(), dim=dims, keepdim=stacked.ndim > 2, dtype=dtype).square()


def _sums(values: Tensor) -> Tensor:
    """Return the sum over the units of each of k tensors, (k,)."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _groups_of_unit(shard: Shard, is_flat: bool) -> list[dist.ProcessGroup]:
    """Return the groups of ranks that share a unit; a row is whole where dim 0 is sharded."""
    parameter = shard.parameter
    if not isinstance(parameter, DTensor):
        return []
    # FSDP2 over tensor parallelism has placements that are not a `Shard` but have its attribute `dim`.
    dims = [getattr(placement, "dim", None) for placement in parameter.placements]
    mesh = parameter.device_mesh
    return [mesh.get_group(i) for i, dim in enumerate(dims) if dim is not None and (dim > 0 or is_flat)]


def _sum_over_ranks(groups: Sequence[dist.ProcessGroup], squares: Tensor) -> Tensor:
    """Return the sums over the ranks that share a unit, computed in place."""
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares
