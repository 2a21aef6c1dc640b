"""SPAM's spike-aware clipping: clip single elements of a gradient that are far above their own second moment."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from zclip.apply import optimizer_parameters
from zclip.arguments import is_number, require
from zclip.norm import Groups, Shard, device_of, local_gradient, parameters_of, statistics_dtype, sum_over_ranks
from zclip.updates.base import OptimizerRule, takes_step
from zclip.updates.pieces import bucket_size


class SPAM(OptimizerRule):
    """Clip each element of a gradient to a multiple of the root of its second moment (Huang et al., arXiv 2501.06842).

    With g an element of the gradient and v its second moment before the step, not corrected for its bias::

        g <- sign(g) * sqrt(theta * v)   where g^2 > theta * v

    The optimizer is `torch.optim.AdamW` or `Adam`, and reads v from its state. Of the paper's optimizer this is the
    clipping (Algorithm 1). Its periodic reset of both moments and the warm-up of the rate after each reset are left
    out, and so is its sparse momentum. An element with v = 0 has no past, and is not clipped: neither is any in the
    first step. In the steps after it v is still small, and more elements are clipped than later. A clipped element
    raises v at once, so a lasting rise is followed within a few steps.

    A strategy that is attached too, such as `ZClip`, acts first, on the norm of the unclipped gradients. So both bounds
    hold afterwards. Gradients are changed in place. Those that a fused step will unscale are compared as it will see
    them. NaN stays NaN. Infinity is clipped like other numbers where v is above 0.

    The rule looks at single elements, so sharding does not change it; one all-reduce of a number adds up the telemetry
    over the shards. On an accelerator nothing waits for the device. Gradients and second moments are read once more.
    There are no statistics beyond counters.

    Args:
        theta: multiple of the second moment that the square of an element may have, > 1. Default 5000, as in the paper.

    Telemetry:

    - `clipped_element_share`: share of the elements that were clipped.
    - `update_clipped`: whether any was.
    """

    optimizers = (Adam,)

    def __init__(self, theta: float = 5000.0) -> None:
        super().__init__()
        self.theta = require(is_number(theta) and 1 < theta < math.inf, "theta", theta, "a finite number above 1")

    def before_step(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> None:
        """Clip the gradients in place."""
        with torch.no_grad():
            shards = parameters_of(optimizer_parameters(optimizer))
            device = device_of(shards)
            zero = torch.zeros((), dtype=statistics_dtype(device), device=device)
            # One sum for the parameters that the same ranks share. Ranks without gradients enter the same collectives.
            owners = {shard.groups: shard for shard in shards}
            clipped, scale = dict.fromkeys(owners, zero), getattr(optimizer, "grad_scale", None)
            with_gradients = [shard for shard in shards if shard.parameter.grad is not None]
            elements = sum(shard.parameter.numel() for shard in with_gradients)
            for part in _parts_above_bounds(_parts(optimizer, with_gradients), self.theta, scale):
                count = clip_elements(part, self.theta, scale).to(zero, non_blocking=True)
                clipped[part.ranks] = clipped[part.ranks] + count
            total = sum_over_ranks([*owners.values()], torch.stack([*clipped.values()])).sum()
            self._prepare_state(zero, (), ())
            self._observe(total, torch.full_like(zero, elements), takes_step(optimizer, device), process_group)

    def _observe(
        self, clipped: Tensor, elements: Tensor, steps: Tensor, process_group: dist.ProcessGroup | None
    ) -> None:
        """Record the telemetry of a step, over all ranks of a process group."""
        if process_group is not None:
            sums = torch.stack([clipped, elements])
            dist.all_reduce(sums, group=process_group)
            clipped, elements = sums.unbind()
        telemetry = {"clipped_element_share": clipped / elements, "update_clipped": clipped > 0}
        finite = torch.ones_like(steps)
        self._record(telemetry, {}, counts=(elements > 0) & steps, finite=finite, clipped=clipped > 0)


class Part(NamedTuple):
    """A part of this rank's shard of a gradient, and its second moment, both as they are in memory."""

    ranks: Groups  # that share the parameter
    gradient: Tensor
    moment: Tensor


def clip_elements(part: Part, theta: float, scale: Tensor | None) -> Tensor:
    """Clip the elements of a part in place; return the number of clipped ones, 0-dim.

    Args:
        part: the part.
        theta: multiple of the second moment that the square of an element may have.
        scale: 0-dim, by which the optimizer's step will divide the gradient; `None`: it does not.
    """
    bound = (wide(part.moment) * theta).sqrt_()
    bound.masked_fill_(bound == 0, math.inf)
    if scale is not None:
        bound.mul_(scale.to(bound, non_blocking=True))
    count = (part.gradient.abs() > bound).sum()
    part.gradient.copy_(wide(part.gradient).clamp(-bound, bound))
    return count


def _parts(optimizer: Any, shards: Sequence[Shard]) -> Iterator[Part]:
    """Yield parts whose temporaries stay in the cache, where memory allows. Parameters without a state have none."""
    for parameter, ranks in shards:
        gradient, moment = local_gradient(parameter), optimizer.state.get(parameter, {}).get("exp_avg_sq")
        if gradient is None or moment is None or not gradient.numel():
            continue
        moment = moment.to_local() if isinstance(moment, DTensor) else moment
        size = bucket_size(gradient)
        if gradient.numel() <= size or not (gradient.is_contiguous() and moment.is_contiguous()):
            yield Part(ranks, gradient, moment)
            continue
        for row in zip(gradient.view(-1).split(size), moment.view(-1).split(size), strict=True):
            yield Part(ranks, *row)


def _parts_above_bounds(parts: Iterable[Part], theta: float, scale: Tensor | None) -> Iterator[Part]:
    """Yield the parts with an element that may be above its bound.

    Only values in the CPU's memory are read. Of an accelerator, all parts are yielded.
    """
    factor = 1.0 if scale is None else float(scale) ** 2 if scale.is_cpu else math.nan
    bucket: list[Part] = []
    elements = 0
    for part in parts:
        if not part.gradient.is_cpu:
            yield part
            continue
        if bucket and elements + part.gradient.numel() > bucket_size(part.gradient):
            yield from _above_bounds(bucket, theta * factor)
            bucket, elements = [], 0
        bucket.append(part)
        elements += part.gradient.numel()
    yield from _above_bounds(bucket, theta * factor)


def _above_bounds(bucket: Sequence[Part], factor: float) -> list[Part]:
    """Return the parts where g^2 - factor * v is above 0 or NaN."""
    if not bucket:
        return []
    gradients = [wide(part.gradient) for part in bucket]
    excess = torch._foreach_mul([wide(part.moment) for part in bucket], -factor)
    torch._foreach_addcmul_(excess, gradients, gradients)
    highest = torch.stack(list(torch._foreach_max(excess))).tolist()
    return [part for part, value in zip(bucket, highest, strict=True) if not value <= 0]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
