"""SPAM's periodic reset of Adam's moments, and the warm-up of the learning rate after each reset."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zclip.apply import optimizer_parameters

#: Adam's moments in the state of an optimizer; the last one is AMSGrad's.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
#: The warm-up begins at 1 - `DEPTH` of the rate, as in a published implementation of SPAM.
DEPTH = 0.99


def check_moments(optimizer: Any) -> None:
    """Raise `TypeError` if the state of an optimizer exists and has no moments of Adam, which could be reset."""
    state = next(filter(None, map(optimizer.state.get, optimizer_parameters(optimizer))), None)
    if state is not None and (missing := [name for name in MOMENTS[:2] if name not in state]):
        name = type(optimizer).__name__
        raise TypeError(f"the moments of {name} cannot be reset: its state has no {' and no '.join(missing)}")


def reset_moments(optimizer: Any, due: Tensor) -> None:
    """Set the moments of all parameters to 0 where `due`, 0-dim bool, is true. Nothing waits for the device."""
    for parameter in optimizer_parameters(optimizer):
        state = optimizer.state.get(parameter, {})
        for moment in (state[name] for name in MOMENTS if name in state):
            local = moment.to_local() if isinstance(moment, DTensor) else moment
            local.masked_fill_(due.to(local.device, non_blocking=True), 0)


def warmup_scale(step: Tensor, every: int, warmup_steps: int, dtype: torch.dtype) -> Tensor:
    """Return the factor on the learning rate of a step, 0-dim.

    Args:
        step: 0-dim integer, number of the step, from 1. Resets come before the steps that `every` divides.
        every: number of steps from one reset to the next.
        warmup_steps: number of steps after a reset with a factor below 1.
        dtype: of the factor.
    """
    since = step % every
    rise = (1 - torch.cos(since.to(dtype) * (math.pi / (warmup_steps + 1)))) / 2
    return torch.where((step >= every) & (since < warmup_steps), 1 - DEPTH + DEPTH * rise, 1.0)
