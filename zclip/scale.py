"""Scaling gradients in place by a coefficient that only the device knows.

On a CPU the coefficient can be looked at, so nothing is touched when nothing is clipped. On an accelerator
looking would make the host wait for every step, so one fused multiplication always runs. A coefficient of 0
means the norm was not finite: the gradients, which hold NaN or Inf, are overwritten by zeros.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def scale_(gradients: list[Tensor], coefficient: Tensor) -> None:
    """Multiply every gradient by `coefficient` in place; a coefficient of 0 sets them to 0, NaN included.

    Args:
        gradients: any shapes and floating dtypes, plain or DTensor.
        coefficient: 0-dim tensor in [0, 1].
    """
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if all(tensor.device.type == "cpu" for tensor in (coefficient, *local)):
        value = float(coefficient)
        if value == 0:
            torch._foreach_zero_(local)
        elif value < 1:
            torch._foreach_mul_(local, value)
        return
    for device, tensors in _by_device(local).items():
        factor = coefficient.to(device)
        torch._foreach_mul_(tensors, factor)
        for tensor in tensors:
            tensor.masked_fill_(factor == 0, 0)


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups
