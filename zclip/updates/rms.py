"""StableAdamW's measure of how far the second moment lags behind the gradients of a tensor, before a step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from zclip.apply import optimizer_parameters, unwrap
from zclip.norm import Groups, device_of, parameters_of, statistics_dtype, sum_over_ranks
from zclip.updates.norm import check_optimizer
from zclip.updates.pieces import Group, Piece, buckets, next_steps, with_gradients


def update_rms(optimizer: Optimizer) -> Tensor:
    """Return StableAdamW's RMS of each parameter in the step that Adam or AdamW is about to take.

    With v the second moment after the step, corrected for its bias (with AMSGrad its maximum), and the mean over all
    elements of a tensor::

        RMS = sqrt(mean(g^2 / max(v, eps^2)))

    It is about 1 while gradients are what v expects, and at most `1 / sqrt(1 - beta2)`. The gradients must be those of
    the step: after accumulation and clipping. Like a fused step, this divides them by `optimizer.grad_scale`, if it is
    set, and the L2 penalty of `Adam` is a part of them. The mean is over the whole of a sharded parameter (DTensor):
    all ranks must call, and one all-reduce serves all parameters of a mesh. Nothing waits for the device.

    Args:
        optimizer: `torch.optim.Adam` or `AdamW`; wrappers of Accelerate and Lightning are unwrapped.

    Returns:
        (n,) of `zclip.norm.statistics_dtype`, in the order of the parameters in the groups; 0 without a gradient.

    Raises:
        TypeError: the optimizer is another one, or FSDP1 has flattened its parameters; or a gradient is sparse or
            complex.
    """
    with torch.no_grad():
        inner = unwrap(optimizer)
        check_optimizer(inner, (Adam,), "update_rms()")
        parameters = optimizer_parameters(inner)
        shards = parameters_of(parameters)
        device = device_of(shards)
        places = {id(shard.parameter): i for i, shard in enumerate(shards)}
        ranks = {id(shard.parameter): shard.groups for shard in shards}
        sums = torch.zeros(len(shards), dtype=statistics_dtype(device), device=device)
        for group in inner.param_groups:
            for owners, values in _sums(inner, group, ranks):
                index = torch.tensor([places[id(p)] for p in owners], device="cpu").to(device, non_blocking=True)
                sums.index_add_(0, index, values.to(sums, non_blocking=True))
        numbers = [max(1, shard.parameter.numel()) for shard in shards]
        sizes = torch.tensor(numbers, dtype=sums.dtype, device="cpu")
        rms = (sum_over_ranks(shards, sums) / sizes.to(device, non_blocking=True)).sqrt()
        if len(shards) == len(parameters):
            return rms
        # Some parameters, such as quantized weights, can have no gradient.
        return torch.stack([rms[places[id(p)]] if id(p) in places else rms.new_zeros(()) for p in parameters])


def _sums(optimizer: Any, group: Group, ranks: Mapping[int, Groups]) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Yield sums of g^2 / max(v, eps^2) over parts of this rank's shards, (k,), with the parameters they are of."""
    parameters = with_gradients(group)
    beta2, eps = float(group["betas"][1]), float(group["eps"])
    names = ("exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    steps = [optimizer.state.get(p, {}).get("step", 0) for p in parameters]
    for bucket, gradients in buckets(optimizer, group, names, ranks):
        device = gradients[0].device
        step = torch.stack(next_steps([steps[piece.owner] for piece in bucket], device))
        correction = 1 - beta2 ** step.to(statistics_dtype(device))
        floors = (eps**2 * correction).to(gradients[0].dtype).clamp(min=torch.finfo(gradients[0].dtype).tiny)
        ratios = _ratios(bucket, gradients, beta2, floors)
        yield [parameters[piece.owner] for piece in bucket], torch.stack(ratios) * correction


def _ratios(bucket: Sequence[Piece], gradients: list[Tensor], beta2: float, floors: Tensor) -> list[Tensor]:
    """Return the sum of g^2 / max(v, floor) over each piece, where v is not yet corrected for its bias."""
    squares = torch._foreach_mul(gradients, gradients)
    moments = torch._foreach_mul([piece.state["exp_avg_sq"] for piece in bucket], beta2)
    torch._foreach_add_(moments, squares, alpha=1 - beta2)
    if "max_exp_avg_sq" in bucket[0].state:
        torch._foreach_maximum_(moments, [piece.state["max_exp_avg_sq"] for piece in bucket])
    torch._foreach_maximum_(moments, floors.unbind())
    torch._foreach_div_(squares, moments)
    return [ratios.sum() for ratios in squares]
