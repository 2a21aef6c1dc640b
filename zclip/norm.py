"""The global norm of gradients, wherever they live: plain tensors, or the shards of DTensors.

Squares are summed in float32 within a tensor and in float64 across tensors. A sharded tensor contributes
its local shard, and the sums are added up over the mesh dimensions that shard it: gradients that are
replicated over a dimension are counted once.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, as one vector, over all ranks.

    Args:
        gradients: non-empty; any shapes, any floating dtypes, plain or DTensor.

    Returns:
        0-dim float32 tensor, the same on every rank of the gradients' meshes.
    """
    plain: list[Tensor] = []
    sharded: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            plain.append(gradient)
            continue
        if any(isinstance(placement, Partial) for placement in gradient.placements):
            reduced = [Replicate() if isinstance(p, Partial) else p for p in gradient.placements]
            gradient = gradient.redistribute(placements=reduced)
        over = tuple(dim for dim, p in enumerate(gradient.placements) if not isinstance(p, Replicate))
        sharded.setdefault((gradient.device_mesh, over), []).append(gradient.to_local())
    squares = [_sum_of_squares(plain)] if plain else []
    for (mesh, over), local in sharded.items():
        total = _sum_of_squares(local)
        for dim in over:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        squares.append(total)
    return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt().to(torch.float32)


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    wide = torch.float32 if norms[0].device.type == "mps" else torch.float64
    return torch.stack([n.to(norms[0].device) for n in norms]).to(wide).square().sum()
