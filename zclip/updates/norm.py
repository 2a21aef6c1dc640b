"""The norm of the update that an optimizer is about to take, from its gradients and its state before the step.

An optimizer's step is `p <- p - lr * u`, decoupled weight decay aside, and `u` is its update. Nothing is changed, and
nothing waits for the device. Adam's rule is not written here a second time: torch's own kernel takes the step, on
copies of the state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from zclip.apply import optimizer_parameters, unwrap
from zclip.norm import (
    Groups,
    device_of,
    global_norm,
    is_flattened,
    local_norms,
    parameters_of,
    statistics_dtype,
    sum_over_ranks,
)
from zclip.updates.pieces import Group, Piece, buckets, next_steps, with_gradients

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


def check_optimizer(
    optimizer: Any, supported: Sequence[type[Optimizer]] = (Adam, SGD), rule: str = "update_norm()"
) -> None:
    """Raise `TypeError` unless an optimizer is one of those that a rule or function supports, and can be measured.

    Args:
        optimizer: the optimizer, without wrappers.
        supported: classes of optimizers.
        rule: name of the rule or function, for the message.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, tuple(supported)):
        known = _listed(supported)
        if not isinstance(optimizer, Adam | SGD):
            raise TypeError(f"the update of {name} is not known before its step: {known}")
        if isinstance(optimizer, SGD) and all(issubclass(each, Adam) for each in supported):
            raise TypeError(f"SGD has no second moment: {known}")
        raise TypeError(f"{rule} does not act on {name}: {known}")
    parameters = optimizer_parameters(optimizer)
    if any(map(is_flattened, parameters)):
        raise TypeError("FSDP1 has flattened the parameters: update norms need FSDP2 (fully_shard)")
    if not parameters_of(parameters):
        raise TypeError(f"this {name} has no parameters that can have gradients")


def _listed(supported: Sequence[type[Optimizer]]) -> str:
    """Return which optimizers are supported, as the end of a sentence."""
    *names, last = [name for each in supported for name in (("Adam", "AdamW") if each is Adam else (each.__name__,))]
    return f"{', '.join(names)} and {last} of torch are supported" if names else f"{last} of torch is supported"


def _norms(optimizer: Any, group: Group, ranks: Mapping[int, Groups]) -> Iterator[tuple[Groups, Tensor]]:
    """Yield norms of parts of this rank's updates in a group, (n,), with the ranks that share their parameters."""
    states = [optimizer.state.get(p, {}) for p in with_gradients(group)]
    names, updates = (_adam if isinstance(optimizer, Adam) else _sgd)(group, states)
    for bucket, gradients in buckets(optimizer, group, names, ranks):
        yield bucket[0].ranks, local_norms(updates(bucket, gradients), gradients[0].device)


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
            next_steps([states[piece.owner].get("step", 0) for piece in bucket], like.device),
            lr=1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"],
            amsgrad=group["amsgrad"], maximize=False,
        )  # fmt: skip
        return [rows[0, : sum(sizes)]]

    return names, updates


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
