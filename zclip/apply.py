"""How a decision reaches the weights: folded into a fused optimizer's step, or by scaling the gradients in place.

torch's fused optimizers divide by their attribute `grad_scale` and do nothing where `found_inf` is 1, in the pass they
make over the gradients anyway. `Fold` hands them the clipping coefficient that way, on top of what a GradScaler puts
there. Other optimizers get gradients multiplied in place. On a CPU the coefficient can be looked at, so nothing is
touched when nothing is clipped; on an accelerator looking would make the host wait, so one fused
multiplication always runs.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from zclip.norm import Shard


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
            torch._foreach_mul_(gradients, [_for(c, g) for c, g in zip(coefficients, gradients, strict=True)])
        elif coefficients != 1:
            torch._foreach_mul_(gradients, float(coefficients))
        return
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        here = [i for i, gradient in enumerate(gradients) if gradient.device == device]
        tensors = [gradients[i] for i in here]
        if isinstance(coefficients, Tensor):
            torch._foreach_mul_(tensors, coefficients.to(device, torch.float32))
        else:
            torch._foreach_mul_(tensors, [_for(coefficients[i], gradients[i]) for i in here])
        zero_here = zero.to(device)
        for tensor in tensors:
            tensor.masked_fill_(zero_here, 0)


def _for(coefficient: Tensor, gradient: Tensor) -> Tensor:
    """Return a coefficient for one gradient: in float32 for half precision, which may not hold it."""
    if gradient.dtype not in (torch.float16, torch.bfloat16):
        return coefficient.to(gradient.device, gradient.dtype)
    wide = coefficient.to(gradient.device, torch.float32)
    return wide.reshape((1,) * gradient.ndim) if wide.ndim == 0 else wide  # a 0-dim tensor would be rounded first


def takes_scale(optimizer: Optimizer) -> bool:
    """Whether an optimizer multiplies gradients by a coefficient in its own pass, and can be told not to step.

    Fused SGD that is told not to take its first step leaves its momentum uninitialised: it counts from the second on.
    """
    groups = optimizer.param_groups
    if not (all(group.get("fused") for group in groups) and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return False
    moved = [p for group in groups if group.get("momentum") for p in group["params"] if p.grad is not None]
    return all(optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in moved)


#: Packages whose wrappers hand gradients on to their `optimizer` untouched; others may read them first.
WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return what steps inside of the wrappers of Accelerate and Lightning."""
    while type(optimizer).__module__.split(".")[0] in WRAPPERS:
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


class Fold:
    """Puts decisions into the steps of one optimizer for which `takes_scale` holds; `Fold.of` gives it.

    The attributes are set at once, because an optimizer that is given a closure runs it, and `ClippingStrategy.step` in
    it, after its hooks. A GradScaler multiplies its scale into `grad_scale` but overwrites `found_inf` just before the
    step: then the hook puts both together.
    """

    _of: ClassVar["weakref.WeakKeyDictionary[Optimizer, Fold]"] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, optimizer: Optimizer) -> "Fold":
        """Return the one fold of an optimizer."""
        fold = cls._of.get(optimizer)
        if fold is None:
            fold = cls._of[optimizer] = cls(optimizer)
        return fold

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._owner: weakref.ref[object] | None = None
        self._ours: dict[str, Tensor] = {}
        self._scaler = False
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def claim(self, owner: object) -> None:
        """Make way for a decision of `owner`.

        Raises:
            ValueError: one of another strategy, which still exists, waits for the optimizer's next step.
        """
        before = self._owner() if self._owner is not None else None
        if self._ours and before is not None and before is not owner:
            raise ValueError("two strategies clip for one optimizer's step: give the optimizer to one of them only")
        self.clear()
        self._owner = weakref.ref(owner)

    def set(self, coefficient: Tensor | None, skip: Tensor) -> None:
        """Have the optimizer's next step multiply the gradients.

        Args:
            coefficient: 0-dim; `None`: the gradients have been scaled already.
            skip: 0-dim bool, whether the step must not happen.
        """
        look = skip.device.type == "cpu"  # there a step that needs nothing can be left alone
        if coefficient is not None and not (look and coefficient == 1):
            self._ours["grad_scale"] = torch.where(skip, 1.0, 1.0 / coefficient).to(torch.float32)
        if not look or skip:
            self._ours["found_inf"] = skip.to(torch.float32)
        for name, value in self._ours.items():
            setattr(self._optimizer(), name, value)

    def release(self, owner: object) -> None:
        """Forget a decision of `owner`, whose step did not come."""
        if self._owner is not None and self._owner() is owner:
            self.clear()

    def clear(self) -> None:
        """Forget the decision."""
        optimizer = self._optimizer()
        for name, value in self._ours.items():
            if getattr(optimizer, name, None) is value:
                delattr(optimizer, name)
        self._ours, self._owner = {}, None

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        ours, found = self._ours.get("found_inf"), getattr(optimizer, "found_inf", None)
        self._scaler = found is not None and found is not ours
        if self._scaler and ours is not None:
            optimizer.found_inf = torch.maximum(ours, found.to(ours))  # type: ignore[union-attr]

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._scaler:
            self._ours, self._owner = {}, None  # a GradScaler deletes both attributes itself
        else:
            self.clear()


class Told(NamedTuple):
    """Parameters of an optimizer that holds ours only, and how it is told a decision: `None`, through gradients."""

    parameters: list[Tensor]
    fold: Fold | None


def claim(optimizers: Sequence[Optimizer], shards: Sequence[Shard], owner: object) -> list[Told]:
    """Return the optimizers that hold our parameters only, and who of them will take a decision of `owner`.

    Raises:
        TypeError: one is no optimizer.
        ValueError: another strategy's decision waits for its step.
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer= takes an optimizer, or several, not {type(optimizer).__name__}")
    ours = {id(shard.parameter) for shard in shards}
    held = [(o, [p for group in o.param_groups for p in group["params"]]) for o in optimizers]
    held = [(o, theirs) for o, theirs in held if {id(p) for p in theirs if p.requires_grad} <= ours]
    holders = Counter(id(p) for _, theirs in held for p in theirs)
    told = [
        # Parameters of two optimizers would be scaled by both.
        Told(theirs, Fold.of(o) if takes_scale(o) and all(holders[id(p)] == 1 for p in theirs) else None)
        for o, theirs in held
    ]
    for _, fold in told:
        if fold is not None:
            fold.claim(owner)
    return told


def carry_out(
    coefficients: Tensor | Sequence[Tensor],
    skip: Tensor,
    blank: Tensor | None,
    told: Sequence[Told],
    shards: Sequence[Shard],
    gradients: Sequence[Tensor | None],
) -> list[Fold]:
    """Fold a decision into the optimizers that take it, and scale the other gradients in place.

    Args:
        coefficients: 0-dim for all gradients, (n,) one for each, or n tensors that broadcast to the gradients.
        skip: 0-dim bool, whether the step must not happen.
        blank: 0-dim bool, whether gradients become zero and optimizers step all the same, whatever `skip` says; then
            all scaling is in place. `None`: gradients become zero only where an optimizer cannot be told to skip.
        told: from `claim`.
        shards: the n parameters.
        gradients: this rank's part of each gradient, `None` where there is none.

    Returns:
        The folds that wait for their optimizers' steps.
    """
    common = coefficients if isinstance(coefficients, Tensor) and coefficients.ndim == 0 else None
    folded_coefficient = common if blank is None else None
    refused = skip if blank is None else skip & ~blank
    folds, folded = [], set()
    for parameters, fold in told:
        if fold is not None:
            fold.set(folded_coefficient, refused)
            folds.append(fold)
            folded |= {id(p) for p in parameters} if folded_coefficient is not None else set()
        elif refused.device.type == "cpu" and refused:
            for parameter in parameters:
                parameter.grad = None  # an optimizer does nothing where there is no gradient
    rest = [
        (i, gradient)
        for i, (shard, gradient) in enumerate(zip(shards, gradients, strict=True))
        if gradient is not None and shard.parameter.grad is not None and id(shard.parameter) not in folded
    ]
    if rest:
        coefficient = [coefficients[i] for i, _ in rest] if common is None else common
        scale_([gradient for _, gradient in rest], coefficient, skip)
    return folds
