"""Apply a decision to the weights: inside a fused optimizer's step, or by scaling the gradients in place.

torch's fused optimizers divide gradients by their attribute `grad_scale` and skip the step where `found_inf` is 1, in
the pass over the gradients that they make anyway. `FusedClip` passes the clipping coefficient that way, combined with
the values of a GradScaler. For other optimizers the gradients are multiplied in place. On a CPU the host reads the
coefficient, and a step that clips nothing changes nothing. On an accelerator reading it would be a device sync, so one
fused multiplication always runs.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from zclip.norm import Shard

#: Packages whose optimizer wrappers pass gradients to their `optimizer` unchanged; other wrappers may read them first.
WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


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
            torch._foreach_mul_(
                gradients, [_cast_like(c, gradient) for c, gradient in zip(coefficients, gradients, strict=True)]
            )
        elif coefficients != 1:
            torch._foreach_mul_(gradients, float(coefficients))
        return
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        indices = [i for i, gradient in enumerate(gradients) if gradient.device == device]
        tensors = [gradients[i] for i in indices]
        if isinstance(coefficients, Tensor):
            torch._foreach_mul_(tensors, coefficients.to(device, torch.float32))
        else:
            torch._foreach_mul_(tensors, [_cast_like(coefficients[i], gradients[i]) for i in indices])
        device_zero = zero.to(device)
        for tensor in tensors:
            tensor.masked_fill_(device_zero, 0)


def _cast_like(coefficient: Tensor, gradient: Tensor) -> Tensor:
    """Return a coefficient on the device of its gradient, in float32 if half precision may not represent it."""
    if gradient.dtype not in (torch.float16, torch.bfloat16):
        return coefficient.to(gradient.device, gradient.dtype)
    wide = coefficient.to(gradient.device, torch.float32)
    # A 0-dim tensor would be rounded to the gradient's dtype before the product.
    return wide.reshape((1,) * gradient.ndim) if wide.ndim == 0 else wide


def supports_fused_scaling(optimizer: Optimizer) -> bool:
    """Return whether an optimizer can scale gradients and skip a step inside its own pass.

    Fused SGD with momentum cannot before its second step: if it skips its first one, its momentum stays uninitialised.
    """
    groups = optimizer.param_groups
    if not (all(group.get("fused") for group in groups) and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return False
    momentum = [p for group in groups if group.get("momentum") for p in group["params"] if p.grad is not None]
    return all(optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in momentum)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside the wrappers of Accelerate and Lightning."""
    while type(optimizer).__module__.split(".")[0] in WRAPPERS:
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


class FusedClip:
    """Applies decisions inside the steps of one optimizer that `supports_fused_scaling`. Use `FusedClip.of`.

    The optimizer's attributes are set immediately, not in a hook: an optimizer that is called with a closure runs its
    pre-hooks first and then the closure, which calls `ClippingStrategy.step`. A GradScaler multiplies its scale into
    `grad_scale`, but overwrites `found_inf` just before the step; the pre-hook combines both values.
    """

    _instances: ClassVar["weakref.WeakKeyDictionary[Optimizer, FusedClip]"] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, optimizer: Optimizer) -> "FusedClip":
        """Return the only instance for an optimizer."""
        instance = cls._instances.get(optimizer)
        if instance is None:
            instance = cls._instances[optimizer] = cls(optimizer)
        return instance

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._owner: weakref.ref[object] | None = None
        self._attributes: dict[str, Tensor] = {}
        self._uses_scaler = False
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def reserve(self, owner: object) -> None:
        """Reserve the optimizer's next step for a decision of `owner`; drop that of an owner that was deleted.

        Raises:
            ValueError: a decision of another strategy waits for this step.
        """
        previous = self._owner() if self._owner is not None else None
        if self._attributes and previous is not None and previous is not owner:
            raise ValueError("two strategies clip for one optimizer's step: give the optimizer to one of them only")
        self.clear()
        self._owner = weakref.ref(owner)

    def set(self, coefficient: Tensor | None, skip: Tensor) -> None:
        """Make the optimizer's next step scale the gradients, or skip.

        Args:
            coefficient: 0-dim; `None`: the gradients are scaled in place.
            skip: 0-dim bool, whether to skip the step.
        """
        on_cpu = skip.device.type == "cpu"  # only then the host can read values, and set nothing if nothing is to do
        if coefficient is not None and not (on_cpu and coefficient == 1):
            self._attributes["grad_scale"] = torch.where(skip, 1.0, 1.0 / coefficient).to(torch.float32)
        if not on_cpu or skip:
            self._attributes["found_inf"] = skip.to(torch.float32)
        for name, value in self._attributes.items():
            setattr(self._optimizer(), name, value)

    def cancel(self, owner: object) -> None:
        """Drop a decision of `owner` that no step has applied."""
        if self._owner is not None and self._owner() is owner:
            self.clear()

    def clear(self) -> None:
        """Drop the decision."""
        optimizer = self._optimizer()
        for name, value in self._attributes.items():
            if getattr(optimizer, name, None) is value:
                delattr(optimizer, name)
        self._attributes, self._owner = {}, None

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        own, current = self._attributes.get("found_inf"), getattr(optimizer, "found_inf", None)
        self._uses_scaler = current is not None and current is not own
        if self._uses_scaler and own is not None:
            optimizer.found_inf = torch.maximum(own, current.to(own))  # type: ignore[union-attr]

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._uses_scaler:
            self._attributes, self._owner = {}, None  # a GradScaler deletes both attributes itself
        else:
            self.clear()


class OptimizerTarget(NamedTuple):
    """An optimizer that a decision is applied to.

    Attributes:
        parameters: all of its parameters.
        fused_clip: applies the decision inside its step; `None`: the decision is applied to the gradients.
    """

    parameters: list[Tensor]
    fused_clip: FusedClip | None


def bind_optimizers(optimizers: Sequence[Optimizer], shards: Sequence[Shard], owner: object) -> list[OptimizerTarget]:
    """Return the optimizers whose trainable parameters are all among the shards', and reserve their next steps.

    An optimizer is fused only if no other optimizer holds its parameters: both would scale their gradients.

    Args:
        optimizers: distinct and unwrapped.
        shards: the parameters that are clipped.
        owner: the strategy, which must outlive its decision.

    Raises:
        TypeError: one of `optimizers` is not an optimizer.
        ValueError: a decision of another strategy waits for the step of one of them.
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer= takes an optimizer, or several, not {type(optimizer).__name__}")
    clipped = {id(shard.parameter) for shard in shards}
    candidates = []
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if {id(p) for p in parameters if p.requires_grad} <= clipped:
            candidates.append((optimizer, parameters))
    holders = Counter(id(p) for _, parameters in candidates for p in parameters)
    targets = []
    for optimizer, parameters in candidates:
        fused = supports_fused_scaling(optimizer) and all(holders[id(p)] == 1 for p in parameters)
        targets.append(OptimizerTarget(parameters, FusedClip.of(optimizer) if fused else None))
    for target in targets:
        if target.fused_clip is not None:
            target.fused_clip.reserve(owner)
    return targets


def apply_decision(
    coefficients: Tensor | Sequence[Tensor],
    skip: Tensor,
    zero_grads: Tensor | None,
    targets: Sequence[OptimizerTarget],
    shards: Sequence[Shard],
    gradients: Sequence[Tensor | None],
) -> list[FusedClip]:
    """Pass a decision to the fused optimizers, and scale the other gradients in place.

    Args:
        coefficients: 0-dim for all gradients, (n,) one for each, or n tensors that broadcast to the gradients.
        skip: 0-dim bool, whether the optimizers must skip the step.
        zero_grads: 0-dim bool, whether gradients are set to zero and the optimizers step, whatever `skip` is; all
            scaling is then in place. `None`: gradients are set to zero only for optimizers that cannot skip a step.
        targets: from `bind_optimizers`.
        shards: the n parameters.
        gradients: this rank's shard of each gradient, `None` where a gradient is missing.

    Returns:
        The `FusedClip` of each optimizer whose next step applies the decision.
    """
    common = coefficients if isinstance(coefficients, Tensor) and coefficients.ndim == 0 else None
    fused_coefficient = common if zero_grads is None else None
    skip_step = skip if zero_grads is None else skip & ~zero_grads
    pending, fused_parameters = [], set()
    for parameters, fused_clip in targets:
        if fused_clip is not None:
            fused_clip.set(fused_coefficient, skip_step)
            pending.append(fused_clip)
            fused_parameters |= {id(p) for p in parameters} if fused_coefficient is not None else set()
        elif skip_step.device.type == "cpu" and skip_step:
            for parameter in parameters:
                parameter.grad = None  # an optimizer does not change a parameter without a gradient
    in_place = [
        (i, gradient)
        for i, (shard, gradient) in enumerate(zip(shards, gradients, strict=True))
        if gradient is not None and shard.parameter.grad is not None and id(shard.parameter) not in fused_parameters
    ]
    if in_place:
        coefficient = [coefficients[i] for i, _ in in_place] if common is None else common
        scale_([gradient for _, gradient in in_place], coefficient, skip)
    return pending
