"""Apply a decision to the weights: inside a fused optimizer's step, or by scaling the gradients in place.

torch's fused optimizers divide gradients by their attribute `grad_scale` and skip the step where `found_inf` is 1, in
the pass over the gradients that they make anyway. `FusedClip` passes the clipping coefficient that way, combined with
the values of a GradScaler. For other optimizers the gradients are multiplied in place. On a CPU the host reads the
coefficient, and a step that clips nothing changes nothing. On an accelerator reading it would be a device sync, so one
fused multiplication always runs.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zclip.decision import GradStats
from zclip.norm import Shard

#: Packages whose optimizer wrappers pass gradients to their `optimizer` unchanged; other wrappers may read them first.
WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
#: Elements up to which a product takes less time than looking whether it is needed.
SMALL = 1 << 12


def scale_(gradients: list[Tensor], coefficients: Tensor | Sequence[Tensor], zero: Tensor) -> None:
    """Multiply n gradients in place.

    Args:
        gradients: n tensors.
        coefficients: 0-dim for all gradients, (n,) one for each, or n tensors that broadcast to the gradients.
        zero: 0-dim bool; where it is true, all gradients become zero, NaN and infinity included.
    """
    if zero.is_cpu and all(gradient.is_cpu for gradient in gradients):
        if zero:
            torch._foreach_zero_(gradients)
        else:
            _multiply_(*_scaled_ones(gradients, coefficients))
        return
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        indices = [i for i, gradient in enumerate(gradients) if gradient.device == device]
        tensors = [gradients[i] for i in indices]
        _multiply_(tensors, _select(coefficients, indices))
        device_zero = zero.to(device)
        for tensor in tensors:
            tensor.masked_fill_(device_zero, 0)


def _scaled_ones(
    gradients: list[Tensor], coefficients: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], Tensor | Sequence[Tensor]]:
    """Return the gradients that their coefficients change, and these; maybe others that are small. Reads values."""
    if not isinstance(coefficients, Tensor):
        each = enumerate(zip(gradients, coefficients, strict=True))
        indices = [i for i, (g, coefficient) in each if g.numel() <= SMALL or (coefficient != 1).any()]
    elif coefficients.ndim:
        indices = (coefficients != 1).nonzero().flatten().tolist()
    else:
        return (gradients if coefficients != 1 else []), coefficients
    return [gradients[i] for i in indices], _select(coefficients, indices)


def _select(coefficients: Tensor | Sequence[Tensor], indices: list[int]) -> Tensor | Sequence[Tensor]:
    """Return the coefficients of some of the gradients."""
    if not isinstance(coefficients, Tensor):
        return [coefficients[i] for i in indices]
    if coefficients.ndim == 0 or len(indices) == len(coefficients):
        return coefficients
    return coefficients[indices] if coefficients.is_cpu else torch.stack([coefficients[i] for i in indices])


def _multiply_(gradients: list[Tensor], coefficients: Tensor | Sequence[Tensor]) -> None:
    """Multiply gradients of one device; see `scale_`. Products are rounded, not factors."""
    if not gradients:
        return
    if isinstance(coefficients, Tensor) and all(gradient.dtype == torch.float32 for gradient in gradients):
        wide = coefficients.to(gradients[0].device, torch.float32)
        torch._foreach_mul_(gradients, wide.unbind() if wide.ndim else wide)
        return
    if isinstance(coefficients, Tensor):
        coefficients = coefficients.unbind() if coefficients.ndim else [coefficients] * len(gradients)
    factors = [_cast_like(c, gradient) for c, gradient in zip(coefficients, gradients, strict=True)]
    torch._foreach_mul_(gradients, factors)


def _cast_like(coefficient: Tensor, gradient: Tensor) -> Tensor:
    """Return a coefficient on the device of its gradient, in float32 if half precision may not represent it."""
    if gradient.dtype not in (torch.float16, torch.bfloat16):
        return coefficient.to(gradient.device, gradient.dtype)
    wide = coefficient.to(gradient.device, torch.float32)
    # A 0-dim tensor would be rounded to the gradient's dtype before the product.
    return wide.reshape((1,) * gradient.ndim) if wide.ndim == 0 else wide


def unwrap(optimizer: Any) -> Any:
    """Return the optimizer inside wrappers that pass gradients to it unchanged."""
    while type(optimizer).__module__.split(".")[0] in WRAPPERS:
        optimizer = optimizer.optimizer
    return optimizer


def listed_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return one optimizer, several or none as a list."""
    return [optimizer] if isinstance(optimizer, Optimizer) else [*(optimizer or ())]


def optimizer_parameters(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def supports_fused_scaling(optimizer: Optimizer) -> bool:
    """Return whether an optimizer can scale gradients and skip a step inside its own pass.

    Fused SGD with momentum cannot before its second step: if it skips its first one, its momentum stays uninitialised.
    """
    groups = optimizer.param_groups
    if not (all(group.get("fused") for group in groups) and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return False
    momentum = [p for group in groups if group.get("momentum") for p in group["params"] if p.grad is not None]
    return all(optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in momentum)


class FusedClip:
    """Applies decisions inside the steps of one optimizer that `supports_fused_scaling`. Use `FusedClip.of`.

    The optimizer's attributes are set immediately, not in a hook. An optimizer that is called with a closure runs its
    pre-hooks first, and then the closure, which calls `ClippingStrategy.step`. A GradScaler multiplies its scale into
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

    @classmethod
    def cancel_all(cls, owner: object) -> None:
        """Drop the decisions of `owner` that no step has applied."""
        for instance in list(cls._instances.values()):
            if instance._owner is not None and instance._owner() is owner:
                instance.clear()

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._owner: weakref.ref[object] | None = None  # the strategy that makes the decision
        self._attributes: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(lambda *_: self.clear())

    def reserve(self, owner: object) -> None:
        """Reserve the optimizer's next step for a decision of `owner`; drop that of an owner that was deleted."""
        previous = self._owner and self._owner()
        if self._attributes and previous is not None:
            raise ValueError("two strategies clip for one optimizer's step: give the optimizer to one of them only")
        self.clear()
        self._owner = weakref.ref(owner)

    def set(self, coefficient: Tensor | None, skip: Tensor) -> None:
        """Make the optimizer's next step skip, or scale the gradients unless they are scaled in place (`None`)."""
        on_cpu = skip.device.type == "cpu"  # only then the host can read values, and set nothing if nothing is to do
        if coefficient is not None and not (on_cpu and coefficient == 1):
            self._attributes["grad_scale"] = torch.where(skip, 1.0, 1.0 / coefficient).to(torch.float32)
        if not on_cpu or skip:
            self._attributes["found_inf"] = skip.to(torch.float32)
        optimizer: Any = self._optimizer()
        scaler_found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler, which deletes both attributes
        if scaler_found_inf is not None and "found_inf" in self._attributes:
            self._attributes["found_inf"] = torch.maximum(skip.to(scaler_found_inf), scaler_found_inf)
        for name, value in self._attributes.items():
            setattr(optimizer, name, value)
        if scaler_found_inf is not None:
            self._attributes, self._owner = {}, None

    def clear(self) -> None:
        """Drop the decision."""
        optimizer = self._optimizer()
        for name, value in self._attributes.items():
            if getattr(optimizer, name, None) is value:
                delattr(optimizer, name)
        self._attributes, self._owner = {}, None

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        own, current = self._attributes.get("found_inf"), getattr(optimizer, "found_inf", None)
        if current is not None and current is not own:
            if own is not None:
                optimizer.found_inf = torch.maximum(own, current.to(own))
            self._attributes, self._owner = {}, None  # a GradScaler deletes both attributes itself


#: All parameters of an optimizer, and what applies a decision inside its step; `None`: gradients are scaled in place.
Target = tuple[list[Tensor], FusedClip | None]


def bind_optimizers(optimizers: Sequence[Optimizer], shards: Sequence[Shard], owner: object) -> list[Target]:
    """Return the optimizers with those of their parameters that are clipped, and reserve the steps of fused ones.

    A decision is applied inside a fused step only if all of the optimizer's parameters are clipped, and no other
    optimizer holds them: both would scale their gradients. `owner` is the strategy, which must outlive its decision.

    Raises:
        TypeError: one of the optimizers is something else.
        ValueError: a decision of another strategy waits for the step of one of them.
    """
    clipped = {id(shard.parameter) for shard in shards}
    candidates: dict[Optimizer, list[Tensor]] = {}
    whole: set[Optimizer] = set()  # all of whose gradients are clipped
    holders: Counter[int] = Counter()
    for inner in map(unwrap, optimizers):
        if not hasattr(inner, "param_groups"):
            raise TypeError(f"optimizer= takes an optimizer, or several, not {type(inner).__name__}")
        if inner in candidates:
            continue
        parameters = optimizer_parameters(inner)
        others = [p for p in parameters if id(p) not in clipped]
        candidates[inner] = [p for p in parameters if id(p) in clipped] if others else parameters
        if not any(p.requires_grad or p.grad is not None for p in others):
            whole.add(inner)
        holders.update(map(id, candidates[inner]))
    shared = {key for key, count in holders.items() if count > 1} if holders.total() > len(holders) else set()
    targets: list[Target] = []
    for inner, parameters in candidates.items():
        fused = inner in whole and supports_fused_scaling(inner) and shared.isdisjoint(map(id, parameters))
        targets.append((parameters, FusedClip.of(inner) if fused else None))
    for _, fused_clip in targets:
        if fused_clip is not None:
            fused_clip.reserve(owner)
    return targets


def apply_decision(
    coefficients: Tensor | Sequence[Tensor],
    skip: Tensor,
    zero_grads: Tensor | None,
    targets: Sequence[Target],
    stats: GradStats,
) -> None:
    """Pass a decision to the fused optimizers, and scale the other gradients in place.

    Args:
        coefficients: 0-dim for all gradients, (n,) one for each, or n tensors that broadcast to the gradients.
        skip: 0-dim bool, whether the optimizers must skip the step.
        zero_grads: 0-dim bool, whether gradients are set to zero and the optimizers step, whatever `skip` is; all
            scaling is then in place. `None`: gradients are set to zero only for optimizers that cannot skip a step.
        targets: from `bind_optimizers`.
        stats: the n parameters and their gradients.
    """
    common = coefficients if isinstance(coefficients, Tensor) and coefficients.ndim == 0 else None
    fused_coefficient = common if zero_grads is None else None
    skip_step = skip if zero_grads is None else skip & ~zero_grads
    fused_parameters: set[int] = set()
    for parameters, fused_clip in targets:
        if fused_clip is not None:
            fused_clip.set(fused_coefficient, skip_step)
            if fused_coefficient is not None:
                fused_parameters.update(map(id, parameters))
        elif skip_step.device.type == "cpu" and skip_step:
            for parameter in parameters:
                parameter.grad = None  # an optimizer does not change a parameter without a gradient
    in_place = [
        i
        for i, (shard, gradient) in enumerate(zip(stats.shards, stats.gradients, strict=True))
        if id(shard.parameter) not in fused_parameters and gradient is not None and shard.parameter.grad is not None
    ]
    if in_place:
        gradients = [gradient for i in in_place if (gradient := stats.gradients[i]) is not None]
        scale_(gradients, _select(coefficients, in_place), skip)
