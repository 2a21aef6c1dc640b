"""Checks of the factors on learning rates that a rule returns, which may be one of your own."""

from typing import Any

import torch
from torch import Tensor

from zclip.host_count import HostCount

#: What a factor may be, for messages.
ALLOWED = "above 0 and at most 1"


class ScaleCheck:
    """Checks the factors of one rule, without a device sync.

    A factor of 0 would stop training, though moments and statistics go on. A step is skipped by a strategy instead.
    """

    def __init__(self) -> None:
        self._invalid: Tensor | None = None  # number of steps with a factor that is not allowed, on an accelerator
        self._count = HostCount()

    def valid(self, method: str, scales: Tensor, steps: Tensor) -> Tensor:
        """Return where the factors of a step are allowed, as bools of their shape.

        Args:
            method: what returned them, such as `Mine.decide`.
            scales: 0-dim or (n,) factors.
            steps: 0-dim bool, whether the optimizer takes the step. Otherwise the factors may be any.

        Raises:
            ValueError: a factor is NaN, not above 0, or above 1. On an accelerator this is raised a step or two late.
        """
        valid = (scales > 0) & (scales <= 1)  # NaN is neither
        if scales.is_cpu:
            if not valid.all() and steps:
                value = scales.reshape(-1)[~valid.reshape(-1)][0].item()
                raise ValueError(f"{method} must return scales {ALLOWED}: one is {value}")
            return valid
        if self._invalid is None or self._invalid.device != scales.device:
            with torch.inference_mode(False):
                self._invalid = torch.zeros((), dtype=torch.int64, device=scales.device)
        self._invalid += ~valid.all() & steps.to(scales.device, non_blocking=True)
        if number := self._count.read(self._invalid):
            raise ValueError(f"{method} must return scales {ALLOWED}: in {number} steps one was not, and counted as 1")
        return valid


def check_shape(method: str, scales: Any, parameters: int) -> None:
    """Raise `TypeError` unless a rule returned `None`, a factor for all parameters, or one for each of them."""
    if scales is None:
        return
    if not isinstance(scales, Tensor):
        raise TypeError(f"{method} must return a tensor or None, not {type(scales).__name__}")
    if scales.ndim and scales.shape != (parameters,):
        raise TypeError(
            f"{method} must return one scale, or one for each of the {parameters} parameters: "
            f"it returned a tensor of shape {list(scales.shape)}"
        )
