"""The norm of the update that an optimizer is about to take, from its gradients and its state before the step.

An optimizer's step is `p <- p - lr * u`, decoupled weight decay aside, and `u` is its update. Nothing is changed, and
nothing waits for the device. Adam's rule is not written here a second time: torch's own kernel takes the step, on
copies of the state. At most `BUCKET` elements are copied at a time, so that the copies stay in the cache.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, Optimizer

from zclip.apply import optimizer_parameters, unwrap
from zclip.norm import (
    Groups,
    device_of,
    global_norm,
    is_flattened,
    local_gradient,
    local_norms,
    parameters_of,
    statistics_dtype,
    sum_over_ranks,
)

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


#: The rule of an optimizer: names of the state that it reads, and a function of pieces and their gradients that returns
#: the updates, or their negatives, as one tensor or more.
Rule = tuple[Sequence[str], Callable[[Sequence[Piece], list[Tensor]], list[Tensor]]]


def update_norm(*optimizers: Optimizer, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the norm of the update that the next step of optimizers would take, before the learning rate.

    For Adam and AdamW the update is `m / (sqrt(v) + eps)` with the moments after the step, corrected for their bias.
    For SGD it is the momentum buffer after the step (with Nesterov's term), or the gradient. The L2 penalty that
    `weight_decay` is in Adam and SGD is a part of the update. AdamW's decoupled weight decay is not. Parameters without
    gradients have no update. Half precision counts as float32: a step that is not fused rounds more often, and one of
    float16 state may be far from this norm where squares of gradients vanish.

    The gradients must be those of the step: after accumulation and clipping. Like a fused step, this divides them by
    `optimizer.grad_scale`, if it is set. Of a sharded parameter (DTensor) the whole counts, and all ranks must call.

    Args:
        optimizers: `torch.optim.Adam`, `AdamW` or `SGD`, or subclasses with the same update; wrappers of Accelerate and
            Lightning are unwrapped.
        process_group: ranks that hold other parameters of the same model, such as pipeline stages. Default: none.

    Returns:
        0-dim tensor of `zclip.norm.statistics_dtype`; 0 without any gradient.

    Raises:
        TypeError: there is no optimizer; one is another one, has no parameters, or holds those that FSDP1 has
            flattened; or a gradient is sparse or complex.
    """
    if not optimizers:
        raise TypeError("update_norm() takes one optimizer or more")
    with torch.no_grad():
        inner = [unwrap(optimizer) for optimizer in optimizers]
        for optimizer in inner:
            check_optimizer(optimizer)
        shards = parameters_of([p for optimizer in inner for p in optimizer_parameters(optimizer)])
        device = device_of(shards)
        zero = torch.zeros((), dtype=statistics_dtype(device), device=device)
        # One sum for the parameters that the same ranks share. Ranks without gradients enter the same collectives.
        owners = {shard.groups: shard for shard in shards}
        sums = dict.fromkeys(owners, zero)
        ranks = {id(shard.parameter): shard.groups for shard in shards}
        for optimizer in inner:
            for group in optimizer.param_groups:
                for groups, norms in _norms(optimizer, group, ranks):
                    sums[groups] = sums[groups] + norms.to(zero).square().sum()
        squares = sum_over_ranks([*owners.values()], torch.stack([*sums.values()]))
        return global_norm(squares.sqrt(), process_group)


def check_optimizer(optimizer: Any) -> None:
    """Raise `TypeError` unless the update of an optimizer can be computed from its state."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Adam | SGD):
        supported = "Adam, AdamW and SGD of torch are supported"
        raise TypeError(f"the update of {name} is not known before its step: {supported}")
    parameters = optimizer_parameters(optimizer)
    if any(map(is_flattened, parameters)):
        raise TypeError("FSDP1 has flattened the parameters: update norms need FSDP2 (fully_shard)")
    if not parameters_of(parameters):
        raise TypeError(f"this {name} has no parameters that can have gradients")


def _norms(optimizer: Any, group: Group, ranks: Mapping[int, Groups]) -> Iterator[tuple[Groups, Tensor]]:
    """Yield norms of parts of this rank's updates in a group, (n,), with the ranks that share their parameters."""
    parameters = [p for p in group["params"] if p.grad is not None]
    states = [optimizer.state.get(p, {}) for p in parameters]
    names, updates = (_adam if isinstance(optimizer, Adam) else _sgd)(group, states)
    pieces = _pieces(parameters, states, names, [ranks[id(p)] for p in parameters])
    for bucket in _buckets(pieces):
        gradients = _gradients(group, bucket, getattr(optimizer, "grad_scale", None))
        yield bucket[0].ranks, local_norms(updates(bucket, gradients), gradients[0].device)


def _pieces(
    parameters: Sequence[Tensor], states: Sequence[Any], names: Sequence[str], ranks: Sequence[Groups]
) -> Iterator[Piece]:
    for owner, (parameter, state, groups) in enumerate(zip(parameters, states, ranks, strict=True)):
        gradient = local_gradient(parameter)
        assert gradient is not None
        moments = [state.get(name) for name in names]
        flat = [_flat(gradient), _flat(parameter), *(_zeros(gradient) if m is None else _flat(m) for m in moments)]
        columns = [_split(t, _bucket_size(gradient)) for t in flat]
        for row in zip(*columns, strict=True):
            part, whole, *rest = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in row)
            part = part.to(whole.dtype).contiguous()  # a fused kernel reads the memory, whatever the strides are
            yield Piece(owner, groups, part, whole, dict(zip(names, rest, strict=True)))


def _zeros(like: Tensor) -> Tensor:
    """Return flat zeros that take no memory."""
    return like.new_zeros(()).expand(like.numel())


def _split(flat: Tensor, size: int) -> Sequence[Tensor]:
    return (flat,) if flat.numel() <= size else flat.split(size)


def _flat(tensor: Tensor) -> Tensor:
    """Return this rank's shard in the order of its indices; a view, if it is contiguous."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().reshape(-1)


def _bucket_size(tensor: Tensor) -> int:
    return BUCKET if tensor.device.type == "cpu" else ACCELERATOR_BUCKET


def _buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield consecutive pieces of one device, dtype and ranks together, up to the size of a bucket."""
    bucket: list[Piece] = []
    elements = 0
    for piece in pieces:
        size = piece.gradient.numel()
        if bucket and (_kind(piece) != _kind(bucket[0]) or elements + size > _bucket_size(piece.gradient)):
            yield bucket
            bucket, elements = [], 0
        bucket.append(piece)
        elements += size
    if bucket:
        yield bucket


def _kind(piece: Piece) -> tuple[Any, ...]:
    return piece.gradient.device, piece.gradient.dtype, piece.ranks


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


def _adam(group: Group, states: Sequence[Any]) -> Rule:
    """Adam and AdamW: torch's fused kernel takes the step on a copy of the state, with weights of 0 and a rate of 1."""
    beta1, beta2 = map(float, group["betas"])
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    memory: dict[Any, Tensor] = {}  # of the copies, which all buckets of a kind use

    def updates(bucket: Sequence[Piece], gradients: list[Tensor]) -> list[Tensor]:
        like, sizes = gradients[0], [gradient.numel() for gradient in gradients]
        rows = memory.get((like.device, like.dtype))
        if rows is None or rows.shape[1] < sum(sizes):
            rows = memory[like.device, like.dtype] = like.new_empty(1 + len(names), sum(sizes))
        weights, *moments = (list(row[: sum(sizes)].split(sizes)) for row in rows)
        torch._foreach_zero_(weights)
        for name, copies in zip(names, moments, strict=True):
            torch._foreach_copy_(copies, [piece.state[name] for piece in bucket])
        torch._fused_adam_(
            weights, gradients, moments[0], moments[1], moments[2] if group["amsgrad"] else [],
            _next_steps([states[piece.owner].get("step", 0) for piece in bucket], like.device),
            lr=1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"],
            amsgrad=group["amsgrad"], maximize=False,
        )  # fmt: skip
        return [rows[0, : sum(sizes)]]

    return names, updates


def _next_steps(steps: Sequence[Tensor | float], device: torch.device) -> list[Tensor]:
    """Return counters of steps after the next one, as fused kernels take them. Those on the device are not read."""
    here = [
        step.float()
        if isinstance(step, Tensor) and step.device == device
        else torch.full((), float(step), dtype=torch.float32, device=device)
        for step in steps
    ]
    return list(torch._foreach_add(here, 1))


def _sgd(group: Group, states: Sequence[Any]) -> Rule:
    """SGD: the update is the momentum buffer, with Nesterov's term if there is one; without momentum the gradient."""
    momentum, nesterov = group["momentum"], group["nesterov"]
    if momentum == 0:
        return (), lambda bucket, gradients: gradients
    # A buffer starts as the first gradient, whatever the dampening is.
    weights = [1 if state.get("momentum_buffer") is None else 1 - group["dampening"] for state in states]

    def updates(bucket: Sequence[Piece], gradients: list[Tensor]) -> list[Tensor]:
        buffers = torch._foreach_mul([piece.state["momentum_buffer"] for piece in bucket], momentum)
        torch._foreach_add_(buffers, torch._foreach_mul(gradients, [weights[piece.owner] for piece in bucket]))
        return list(torch._foreach_add(gradients, buffers, alpha=momentum) if nesterov else buffers)

    return ("momentum_buffer",), updates
