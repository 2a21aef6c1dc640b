"""Input and results of a strategy's rule, for one step."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from zclip.norm import Shard

State = dict[str, Tensor]


class Decision(NamedTuple):
    """Result of a rule over the global norm, for one step.

    Attributes:
        target: 0-dim tensor, upper bound on the norm after clipping; `inf` where the rule does not clip.
        state: statistics after this step, with the keys and shapes of the state that was passed in.
        telemetry: 0-dim tensors to record, by name. Default: none.
    """

    target: Tensor
    state: State
    telemetry: Mapping[str, Tensor] = MappingProxyType({})


class GradStats(NamedTuple):
    """Input of a rule, for one step of n parameters.

    Attributes:
        norm: 0-dim, global norm before clipping, finite.
        norms: (n,) norm of each gradient over all ranks that share it, finite; 0 where a gradient is missing.
        loss: 0-dim, loss of the step; `None` if the caller did not pass it.
        shards: the n parameters; empty in `ClippingStrategy.observe`, where only a norm is known.
        gradients: this rank's shard of each gradient, `None` where a gradient is missing.
        process_group: ranks that hold other parameters of the same model, such as pipeline stages.
    """

    norm: Tensor
    norms: Tensor
    loss: Tensor | None = None
    shards: Sequence[Shard] = ()
    gradients: Sequence[Tensor | None] = ()
    process_group: dist.ProcessGroup | None = None

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum of a 0-dim value over the ranks of `process_group`."""
        if self.process_group is not None:
            value = value.to(self.norm.dtype, copy=True)
            dist.all_reduce(value, group=self.process_group)
        return value


class ClipResult(NamedTuple):
    """Result of any rule, for one step of n parameters.

    Attributes:
        coefficients: factors on the gradients: one 0-dim tensor for all, an (n,) tensor with one for each, or n
            tensors that broadcast to the gradients.
        clipped_norm: 0-dim, global norm after clipping.
        clipped: 0-dim bool, whether any gradient is scaled.
        state: statistics after this step, with the keys and shapes of the state that was passed in.
        telemetry: 0-dim tensors to record, by name. Default: none.
        skip: 0-dim bool, whether the optimizer must skip the step. Default `None`: it steps.
    """

    coefficients: Tensor | Sequence[Tensor]
    clipped_norm: Tensor
    clipped: Tensor
    state: State
    telemetry: Mapping[str, Tensor] = MappingProxyType({})
    skip: Tensor | None = None


def clip_tensors(stats: GradStats, coefficients: Tensor, state: State) -> ClipResult:
    """Return the result of a rule that scales tensors down, each by its own coefficient, and counts them.

    Args:
        stats: norms of this step.
        coefficients: (n,) factors of at most 1.
        state: statistics after this step.
    """
    clipped_tensors = stats.all_reduce_sum((coefficients < 1).sum())
    return ClipResult(
        coefficients,
        clipped_norm=stats.all_reduce_sum((stats.norms * coefficients).square().sum()).sqrt(),
        clipped=clipped_tensors > 0,
        state=state,
        telemetry={"clipped_tensors": clipped_tensors},
    )
