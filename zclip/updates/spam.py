"""SPAM: clip single elements of a gradient that are far above their own second moment, and reset the moments."""

import math
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from zclip.apply import optimizer_parameters
from zclip.arguments import integer, is_number, require
from zclip.decision import State
from zclip.host_count import HostCount
from zclip.norm import Groups, Shard, device_of, local_gradient, parameters_of, statistics_dtype, sum_over_ranks
from zclip.updates.base import OptimizerRule, takes_step
from zclip.updates.pieces import bucket_size
from zclip.updates.resets import check_moments, reset_moments, warmup_scale


class SPAM(OptimizerRule):
    """Clip each element of a gradient to a multiple of the root of its second moment (Huang et al., arXiv 2501.06842).

    With g an element of the gradient and v its second moment before the step, not corrected for its bias::

        g <- sign(g) * sqrt(theta * v)   where g^2 > theta * v

    The optimizer is `torch.optim.AdamW` or `Adam`; v is read from its state. An element with v = 0 has no past, and is
    not clipped: neither is any in the first step. In the steps after it v is still small, and more elements are clipped
    than later. A clipped element raises v at once, so a lasting rise is followed within a few steps.

    With `reset_every`, both moments are set to 0 before step reset_every, 2 reset_every, and so on. In the k-th step
    from a reset on, counted from 0, with N = `reset_warmup_steps`, the rate of all groups is multiplied by::

        1 - 0.99 * (1 + cos(pi * k / (N + 1))) / 2    where k < N

    The paper resets every 500 steps. That is not the default here: the rate would be lower in 150 of 500 steps, and its
    effect could not be separated from that of the clipping. Details follow a published implementation of SPAM: the bias
    correction of Adam goes on as without resets, the warm-up begins at 0.01, and there is none at the start. Two things
    differ: that code clips nothing in 20 steps after each reset, and does not lower the rate of the weight decay. The
    paper's sparse momentum is left out.

    Steps that a GradScaler or a strategy skips, and steps without gradients, do not count. AMSGrad's maximum is reset
    too. Sharded moments are reset on each rank.

    A strategy that is attached too, such as `ZClip`, acts first, on the norm of the unclipped gradients. So both bounds
    hold afterwards. Gradients are changed in place. Those that a fused step will unscale are compared as it will see
    them. NaN stays NaN. Infinity is clipped like other numbers where v is above 0.

    The rule looks at single elements, so sharding does not change it; one all-reduce of a number adds up the telemetry
    over the shards. On an accelerator nothing waits for the device, with `reset_every` if the optimizer is fused or
    capturable. Gradients and second moments are read once more. The only statistic is the number of steps.

    Args:
        theta: multiple of the second moment that the square of an element may have, > 1. Default 5000, as in the paper.
        reset_every: number of steps from one reset to the next, >= 2. Default `None`: no resets; 500 in the paper.
        reset_warmup_steps: N, number of steps of the warm-up, >= 1 and below `reset_every`. Default 150, as in the
            paper. Without resets it has no meaning.

    Raises:
        TypeError: in the optimizer's step, with `reset_every`: its state does not have Adam's moments.

    Telemetry:

    - `clipped_element_share`: share of the elements that were clipped.
    - `update_clipped`: whether any was.
    - `update_scale`: the factor on the learning rate, with `reset_every`.
    """

    optimizers = (Adam,)
    nonnegative = ("count",)
    added = MappingProxyType({"reset_every": None, "reset_warmup_steps": 150})
    added_statistics = ("count",)

    def __init__(self, theta: float = 5000.0, reset_every: int | None = None, reset_warmup_steps: int = 150) -> None:
        super().__init__()
        self.theta = require(is_number(theta) and 1 < theta < math.inf, "theta", theta, "a finite number above 1")
        self.reset_every = integer("reset_every", reset_every, minimum=2, null="for no resets")
        self.reset_warmup_steps = integer("reset_warmup_steps", reset_warmup_steps)
        if reset_every is not None:
            allowed = f"below reset_every={reset_every}"
            require(reset_warmup_steps < reset_every, "reset_warmup_steps", reset_warmup_steps, allowed)
        self._host_count = HostCount()

    def initial_state(self, like: Tensor) -> State:
        """Return the number of steps taken."""
        return {"count": torch.zeros((), dtype=torch.int64, device=like.device)}

    def before_step(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> Tensor | None:
        """Reset the moments if it is due, clip the gradients in place, and return the factor of the warm-up."""
        with torch.no_grad():
            shards = parameters_of(optimizer_parameters(optimizer))
            device = device_of(shards)
            zero = torch.zeros((), dtype=statistics_dtype(device), device=device)
            self._prepare_state(zero, (), ())
            scale = None if self.reset_every is None else self._reset(optimizer, self.reset_every, zero.dtype)
            # One sum for the parameters that the same ranks share. Ranks without gradients enter the same collectives.
            owners = {shard.groups: shard for shard in shards}
            clipped, grad_scale = dict.fromkeys(owners, zero), getattr(optimizer, "grad_scale", None)
            with_gradients = [shard for shard in shards if shard.parameter.grad is not None]
            elements = sum(shard.parameter.numel() for shard in with_gradients)
            for part in _parts_above_bounds(_parts(optimizer, with_gradients), self.theta, grad_scale):
                count = clip_elements(part, self.theta, grad_scale).to(zero, non_blocking=True)
                clipped[part.ranks] = clipped[part.ranks] + count
            total = sum_over_ranks([*owners.values()], torch.stack([*clipped.values()])).sum()
            self._observe(total, torch.full_like(zero, elements), takes_step(optimizer, device), process_group, scale)
            return scale

    def _reset(self, optimizer: Optimizer, every: int, dtype: torch.dtype) -> Tensor:
        """Reset the moments before a step that `every` divides; return the factor on the rate.

        A reset that comes before a step which is skipped comes again before the next one, to the same effect.
        """
        check_moments(optimizer)
        count = self.state["count"]
        known, most = self._host_count.read(count), self._host_count.age + 1  # that `count + 1` may be above it
        if known is None or (known + most) // every > known // every:
            reset_moments(optimizer, (count + 1) % every == 0)
        return warmup_scale(count + 1, every, self.reset_warmup_steps, dtype)

    def _observe(
        self,
        clipped: Tensor,
        elements: Tensor,
        steps: Tensor,
        process_group: dist.ProcessGroup | None,
        scale: Tensor | None,
    ) -> None:
        """Record the telemetry of a step, over all ranks of a process group."""
        if process_group is not None:
            sums = torch.stack([clipped, elements])
            dist.all_reduce(sums, group=process_group)
            clipped, elements = sums.unbind()
        telemetry = {"clipped_element_share": clipped / elements, "update_clipped": clipped > 0}
        state = {key: value + 1 for key, value in self.state.items()}
        if scale is not None:
            telemetry["update_scale"] = scale
        counts, finite = (elements > 0) & steps, torch.ones_like(steps)
        self._record(telemetry, state, counts=counts, finite=finite, clipped=clipped > 0)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what belongs to an optimizer of this process."""
        return {**super().__getstate__(), "_host_count": HostCount()}


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
