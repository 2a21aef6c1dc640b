"""The gradients and the state that an optimizer's step will read, in parts that stay in the cache.

Nothing is changed, and nothing waits for the device. At most `BUCKET` elements are handed out at a time, so that what
is computed from them needs little memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zclip.norm import Groups, local_gradient

#: Elements of each temporary on a CPU, and on accelerators. There are at most four at a time.
BUCKET, ACCELERATOR_BUCKET = 1 << 19, 1 << 22

Group = dict[str, Any]


class Piece(NamedTuple):
    """A part of this rank's shard of one parameter, as flat tensors in float32 or wider."""

    owner: int  # number of the parameter, among those of its group that have gradients
    ranks: Groups  # that share the parameter
    gradient: Tensor
    parameter: Tensor
    state: Mapping[str, Tensor]  # of the optimizer; zeros where it has none yet


def buckets(
    optimizer: Any, group: Group, names: Sequence[str], ranks: Mapping[int, Groups]
) -> Iterator[tuple[list[Piece], list[Tensor]]]:
    """Yield consecutive pieces of one device, dtype and ranks, with the gradients as the optimizer's rule takes them.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups.
        names: entries of the state that are read.
        ranks: process groups that share a parameter, by the parameter's id.
    """
    parameters = with_gradients(group)
    states = [optimizer.state.get(p, {}) for p in parameters]
    pieces = _pieces(parameters, states, names, [ranks[id(p)] for p in parameters])
    for bucket in _buckets(pieces):
        yield bucket, _gradients(group, bucket, getattr(optimizer, "grad_scale", None))


def with_gradients(group: Group) -> list[Tensor]:
    """Return the parameters of a group that have gradients: only these take a step."""
    return [p for p in group["params"] if p.grad is not None]


def _pieces(
    parameters: Sequence[Tensor], states: Sequence[Any], names: Sequence[str], ranks: Sequence[Groups]
) -> Iterator[Piece]:
    for owner, (parameter, state, groups) in enumerate(zip(parameters, states, ranks, strict=True)):
        gradient = local_gradient(parameter)
        assert gradient is not None
        moments = [state.get(name) for name in names]
        is_small = gradient.numel() <= bucket_size(gradient) and gradient.dtype == parameter.dtype
        if is_small and all(map(_is_ready, (gradient, parameter, *moments))):
            views = {name: _viewed(moment) for name, moment in zip(names, moments, strict=True)}
            yield Piece(owner, groups, _viewed(gradient), _viewed(parameter), views)
            continue
        flat = [_flat(gradient), _flat(parameter), *(_zeros(gradient) if m is None else _flat(m) for m in moments)]
        columns = [_split(t, bucket_size(gradient)) for t in flat]
        for row in zip(*columns, strict=True):
            part, whole, *rest = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in row)
            part = part.to(whole.dtype).contiguous()  # a fused kernel reads the memory, whatever the strides are
            yield Piece(owner, groups, part, whole, dict(zip(names, rest, strict=True)))


def _is_ready(tensor: Any) -> bool:
    """Return whether a tensor needs no copy. Without the other work, many small ones take half of the time."""
    if tensor is None or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return tensor.is_contiguous() and not isinstance(tensor, DTensor)


def _viewed(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 1 else tensor.view(-1)


def _zeros(like: Tensor) -> Tensor:
    """Return flat zeros that take no memory."""
    return like.new_zeros(()).expand(like.numel())


def _split(flat: Tensor, size: int) -> Sequence[Tensor]:
    return (flat,) if flat.numel() <= size else flat.split(size)


def _flat(tensor: Tensor) -> Tensor:
    """Return this rank's shard in the order of its indices; a view, if it is contiguous."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().reshape(-1)


def bucket_size(tensor: Tensor) -> int:
    """Return the number of elements that are handled at a time on the device of a tensor."""
    return BUCKET if tensor.is_cpu else ACCELERATOR_BUCKET


def _buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield consecutive pieces of one device, dtype and ranks together, up to the size of a bucket."""
    bucket: list[Piece] = []
    kind: tuple[Any, ...] = ()
    elements = 0
    for piece in pieces:
        gradient = piece.gradient
        size, own_kind = gradient.numel(), (gradient.device, gradient.dtype, piece.ranks)
        if bucket and (own_kind != kind or elements + size > bucket_size(gradient)):
            yield bucket
            bucket, elements = [], 0
        kind = own_kind
        bucket.append(piece)
        elements += size
    if bucket:
        yield bucket


def _gradients(group: Group, bucket: Sequence[Piece], grad_scale: Tensor | None) -> list[Tensor]:
    """Return the gradients as the optimizer's rule takes them: unscaled, of a loss to minimise, with the L2 penalty."""
    gradients = [piece.gradient for piece in bucket]
    if grad_scale is not None:
        gradients = list(torch._foreach_div(gradients, grad_scale.to(gradients[0], non_blocking=True)))
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False):
        parameters = [piece.parameter for piece in bucket]
        gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
    return gradients


def next_steps(steps: Sequence[Tensor | float], device: torch.device) -> list[Tensor]:
    """Return counters of steps after the next one, as fused kernels take them. Those on the device are not read."""
    here = [
        step.float()
        if isinstance(step, Tensor) and step.device == device
        else torch.full((), float(step), dtype=torch.float32, device=device)
        for step in steps
    ]
    return list(torch._foreach_add(here, 1))
