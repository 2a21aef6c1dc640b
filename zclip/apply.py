"""How a decision reaches the weights: folded into a fused optimizer's step, or by scaling the gradients in place.

torch's fused optimizers divide by their attribute `grad_scale` and do nothing where `found_inf` is 1, in the pass they
make over the gradients anyway. `Fold` hands them the clipping coefficient that way, on top of what a GradScaler puts
there. Other optimizers get gradients multiplied in place. On a CPU the coefficient can be looked at, so nothing is
touched when nothing is clipped; on an accelerator looking would make the host wait, so one fused
multiplication always runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def scale_(gradients: list[Tensor], coefficients: Tensor | Sequence[Tensor], zero: Tensor) -> None:
    """Multiply gradients in place; where `zero` is true set them to zero, NaN and infinity included.

    Args:
        gradients: n local tensors, any floating dtypes.
        coefficients: 0-dim for all, or n tensors that broadcast to the gradients.
        zero: 0-dim bool.
    """
    if all(tensor.device.type == "cpu" for tensor in (zero, *gradients)):
        if zero:
            torch._foreach_zero_(gradients)
        elif not isinstance(coefficients, Tensor):
            torch._foreach_mul_(gradients, [c.to(g.dtype) for c, g in zip(coefficients, gradients, strict=True)])
        elif coefficients != 1:
            torch._foreach_mul_(gradients, float(coefficients))
        return
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        here = [i for i, gradient in enumerate(gradients) if gradient.device == device]
        tensors = [gradients[i] for i in here]
        if isinstance(coefficients, Tensor):
            torch._foreach_mul_(tensors, coefficients.to(device, torch.float32))
        else:
            torch._foreach_mul_(tensors, [coefficients[i].to(device, gradients[i].dtype) for i in here])
        zero_here = zero.to(device)
        for tensor in tensors:
            tensor.masked_fill_(zero_here, 0)


def takes_scale(optimizer: Optimizer) -> bool:
    """Whether an optimizer multiplies gradients by a coefficient in its own pass, and can be told not to step."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Fold:
    """Puts decisions into the steps of one optimizer for which `takes_scale` holds.

    The attributes are set at once, because an optimizer that is given a closure runs it, and `ClippingStrategy.step` in
    it, after its hooks. A GradScaler overwrites them just before the step: then the hook puts both together.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._ours: tuple[Tensor | None, Tensor | None] | None = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def set(self, optimizer: Optimizer, coefficient: Tensor | None, skip: Tensor) -> None:
        """Have the optimizer's next step multiply the gradients.

        Args:
            optimizer: the one this was made for.
            coefficient: 0-dim; `None`: the gradients have been scaled already.
            skip: 0-dim bool, whether the step must not happen.
        """
        look = skip.device.type == "cpu"  # there a step that needs nothing can be left alone
        scale = found = None
        if coefficient is not None and not (look and coefficient == 1):
            scale = torch.where(skip, 1.0, 1.0 / coefficient).to(torch.float32)
        if not look or skip:
            found = skip.to(torch.float32)
        self._ours = (scale, found)
        optimizer.grad_scale, optimizer.found_inf = scale, found  # type: ignore[attr-defined]

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._ours is None:
            return
        for name, ours, join in zip(("grad_scale", "found_inf"), self._ours, (torch.mul, torch.maximum), strict=True):
            theirs = getattr(optimizer, name, None)
            if theirs is not ours and ours is not None:
                setattr(optimizer, name, ours if theirs is None else join(ours, theirs.to(ours)))

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._ours is not None:
            optimizer.grad_scale = optimizer.found_inf = None
            self._ours = None
