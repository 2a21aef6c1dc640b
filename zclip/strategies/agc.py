"""NFNet AGC: each unit's gradient is clipped relative to the unit's weights."""

from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zclip.base import Clipping, ClippingStrategy, Measured, Policy, State, is_number, require
from zclip.norm import Shard, sum_over_ranks


class AGC(ClippingStrategy):
    """Unit-wise adaptive gradient clipping (Brock et al., arXiv 2102.06171, equation 3).

    For row i of a weight W with gradient G (a whole tensor where it has fewer than two dimensions)

        G_i <- G_i min(1, ratio max(||W_i||, eps) / ||G_i||)

    It has no statistics. It reads the weights as well as the gradients, so it costs more than the norm-based
    strategies. The paper leaves out the last linear layer: give `step` the parameters to clip.

    Args:
        ratio: lambda, ratio of gradient norm to weight norm that a unit may reach. Default 0.01.
        eps: least weight norm, so that zero weights can move. Default 1e-3.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: an argument is out of its range; or, in `step`, parameters are flattened by FSDP1, which leaves no
            rows to look at.

    Telemetry, besides that of every strategy: `clipped_units`, how many.
    """

    def __init__(self, ratio: float = 0.01, eps: float = 1e-3, **policy: Unpack[Policy]) -> None:
        require(is_number(ratio) and ratio > 0, "ratio", ratio, "a number above 0")
        require(is_number(eps) and eps > 0, "eps", eps, "a number above 0")
        super().__init__(None, **policy)
        self.ratio = ratio
        self.eps = eps

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Return a column of coefficients for each tensor."""
        shards = measured.shards
        if not shards:
            raise ValueError("AGC looks at weights and gradients: a norm alone does not tell what it would do")
        if any(shard.groups and not isinstance(shard.parameter, DTensor) for shard in shards):
            raise ValueError("AGC looks at the rows of weights, which FSDP1 flattens: shard with FSDP2 instead")
        coefficients, kept, clipped = [], [], []
        for shard, given in zip(shards, measured.gradients, strict=True):
            parameter = shard.parameter
            weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            gradient = torch.zeros_like(weight) if given is None else given
            local = _unit_squares(gradient)
            unit, scale = (_over_ranks(shard, squares).sqrt() for squares in (local.clone(), _unit_squares(weight)))
            coefficient = (self.ratio * scale.clamp(min=self.eps) / unit).clamp(max=1)
            coefficient = torch.where(unit > 0, coefficient, 1.0)
            coefficients.append(coefficient)
            kept.append((local * coefficient.square()).sum().to(measured.norm))
            clipped.append((coefficient < 1).sum().to(measured.norm))
        norm = measured.everywhere(sum_over_ranks(shards, torch.stack(kept)).sum()).sqrt()
        units = measured.everywhere(sum_over_ranks(shards, torch.stack(clipped)).sum())
        telemetry = {"clipped_units": units}
        return Clipping(coefficients, norm, units > 0, state, telemetry)


def _unit_squares(local: Tensor) -> Tensor:
    """Return the sums of squares of the rows, (rows, 1, ...), or of the whole, 0-dim, in float32 at least."""
    squares = local.detach().to(torch.promote_types(local.dtype, torch.float32)).square()
    return squares.sum() if local.ndim < 2 else squares.sum(dim=tuple(range(1, local.ndim)), keepdim=True)


def _over_ranks(shard: Shard, squares: Tensor) -> Tensor:
    """Add up the parts of units that several ranks hold; rows on different ranks are different units."""
    parameter = shard.parameter
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            # FSDP2 over tensor parallelism gives placements that are no `Shard`, but have its `dim`.
            split: int | None = getattr(placement, "dim", None)
            if split is not None and (split > 0 or squares.ndim == 0):
                dist.all_reduce(squares, group=parameter.device_mesh.get_group(dim))
    return squares
