"""SPAM's spike-aware clipping: clip single elements of a gradient that are far above their own second moment."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from zclip.apply import optimizer_parameters
from zclip.arguments import is_number, require
from zclip.norm import device_of, local_gradient, parameters_of, statistics_dtype, sum_over_ranks
from zclip.updates.base import OptimizerRule, takes_step
from zclip.updates.pieces import bucket_size


class SPAM(OptimizerRule):
    """Clip each element of a gradient to a multiple of the root of its second moment (Huang et al., arXiv 2501.06842).

    With g an element of the gradient and v its second moment before the step, not corrected for its bias::

        g <- sign(g) * sqrt(theta * v)   where g^2 > theta * v

    The optimizer is `torch.optim.AdamW` or `Adam`, and reads v from its state. Of the paper's optimizer this is the
    clipping (Algorithm 1). Its periodic reset of both moments and the warm-up of the rate after each reset are left
    out, and so is its sparse momentum. An element with v = 0 has no past, and is not clipped: neither is any in the
    first step. A clipped element raises v at once, so a lasting rise is followed within a few steps.

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
            clipped, elements = dict.fromkeys(owners, zero), 0
            for shard in shards:
                if shard.parameter.grad is not None:
                    elements += shard.parameter.numel()
                    for count in clip_elements(optimizer, shard.parameter, self.theta):
                        clipped[shard.groups] = clipped[shard.groups] + count.to(zero, non_blocking=True)
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


def clip_elements(optimizer: Any, parameter: Tensor, theta: float) -> Iterator[Tensor]:
    """Clip this rank's elements of a gradient; yield the numbers of clipped ones in its parts, each 0-dim."""
    gradient, state = local_gradient(parameter), optimizer.state.get(parameter, {})
    moment, scale = state.get("exp_avg_sq"), getattr(optimizer, "grad_scale", None)
    if gradient is None or moment is None:
        return
    moment = moment.to_local() if isinstance(moment, DTensor) else moment
    for part, v in _parts(gradient, moment):
        wide = torch.promote_types(part.dtype, torch.float32)
        bound = (v.to(wide) * theta).sqrt_()
        bound.masked_fill_(bound == 0, math.inf)
        if scale is not None:
            bound.mul_(scale.to(bound, non_blocking=True))
        count = (part.abs() > bound).sum()
        if not (count.is_cpu and count == 0):
            part.copy_(part.to(wide).clamp(-bound, bound))
        yield count


def _parts(gradient: Tensor, moment: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of both that temporaries of their size stay in the cache, if their memory allows."""
    if not (gradient.is_contiguous() and moment.is_contiguous()):
        yield gradient, moment
        return
    size = bucket_size(gradient)
    yield from zip(gradient.view(-1).split(size), moment.view(-1).split(size), strict=True)
