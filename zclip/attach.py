"""Clip before every step of an optimizer, by the hook that torch's optimizers call there.

The hook comes after backward, accumulation and whatever else the loop does. Two things are then left to do. A closure
makes the gradients inside the step, so the hook clips at the closure's end. A GradScaler leaves the unscaling of
gradients to a fused optimizer's step, so the hook unscales them first. One kind of step is no step of training:
`torch.distributed.checkpoint` makes an optimizer create its state by a step with zero gradients and learning rates.
"""

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zclip.apply import FusedClip, optimizer_parameters, scale_, unwrap
from zclip.norm import local_gradients

#: Clips the gradients of an optimizer's parameters; it gets the loss that a closure returned.
Clip = Callable[[Optimizer, Tensor | None], None]
#: Code of the function that torch puts around the `step` of each class, and that calls the hooks.
HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__


class Attachment:
    """The hook of a strategy on one optimizer.

    Args:
        optimizer: the optimizer; wrappers of Accelerate and Lightning are unwrapped.
        clip: called before each step. The hook keeps it alive, and with it the strategy.

    Raises:
        TypeError: `optimizer` is something else.
        ValueError: a strategy is attached to the optimizer already.
    """

    _attached: ClassVar["weakref.WeakSet[Optimizer]"] = weakref.WeakSet()

    @classmethod
    def is_on(cls, optimizer: Any) -> bool:
        """Whether a strategy is attached to an optimizer, or to the one inside a wrapper."""
        inner = unwrap(optimizer)
        return isinstance(inner, Optimizer) and inner in cls._attached

    def __init__(self, optimizer: Optimizer, clip: Clip) -> None:
        inner = unwrap(optimizer)
        if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
            raise TypeError(f"attach() takes an optimizer of torch, not {type(optimizer).__name__}")
        if inner in self._attached:
            raise ValueError("a strategy is attached to this optimizer already: detach() that one first")
        FusedClip.of(inner)  # registers a hook, which is not possible while hooks are called
        self._clip = clip
        self._optimizer = weakref.ref(inner)
        self._hook = inner.register_step_pre_hook(self._before_step)
        self._attached.add(inner)

    def remove(self) -> None:
        """Remove the hook."""
        self._hook.remove()
        if (optimizer := self._optimizer()) is not None:
            self._attached.discard(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if _is_inner_step(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch passes the optimizer among args
        if not callable(closure):  # none, or an argument of a step that takes others
            if not ("closure" in kwargs and _has_no_state(optimizer)):
                _unscale(optimizer)
                self._clip(optimizer, None)
            return None

        def clipped_closure() -> Any:
            loss = closure()
            value = torch.tensor(loss, dtype=torch.float64) if isinstance(loss, float) else loss
            self._clip(optimizer, value if isinstance(value, Tensor) else None)
            return loss

        if len(args) > 1:
            return (args[0], clipped_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipped_closure}


def _has_no_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer has no state yet, and learning rates of 0.

    `torch.distributed.checkpoint` then calls `step(closure=None)`. Gradients are not looked at: ranks must agree.
    """
    return not optimizer.state and all(group.get("lr") == 0 for group in optimizer.param_groups)


def _is_inner_step(optimizer: Optimizer) -> bool:
    """Whether the hooks are called by a step within a step: that of a subclass calls `super().step()`.

    The stack tells. A flag would stay set where a step raises, and the next step would not be clipped.
    """
    frame: FrameType | None = sys._getframe(1)
    steps = 0
    while frame is not None:
        steps += frame.f_code is HOOKED_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _unscale(optimizer: Any) -> None:
    """Divide the gradients by the scale that a GradScaler has left to the optimizer's step."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    gradients = [gradient for gradient in local_gradients(optimizer_parameters(optimizer)) if gradient is not None]
    if gradients:
        scale_(gradients, 1 / scale, scale.new_zeros((), dtype=bool))
    optimizer.grad_scale = None
