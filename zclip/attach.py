"""Act before every step of an optimizer, by the hook that torch's optimizers call there.

The hook comes after backward, accumulation and whatever else the loop does. Two things are then left to do. A closure
makes the gradients inside the step, so the hook acts at the closure's end. A GradScaler leaves the unscaling of
gradients to a fused optimizer's step, so a strategy unscales them first. One kind of step is no step of training:
`torch.distributed.checkpoint` makes an optimizer create its state by a step with zero gradients and learning rates.
"""

import sys
import weakref
from collections.abc import Callable
from operator import is_
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zclip.apply import FusedClip, optimizer_parameters, scale_, unwrap
from zclip.arguments import plain
from zclip.norm import Parameters, Shard, local_gradients, parameters_of

#: Called before the step of an optimizer; it gets the loss that a closure returned.
BeforeStep = Callable[[Optimizer, Tensor | None], None]
#: Code of the function that torch puts around the `step` of each class, and that calls the hooks.
HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
#: Module that makes an optimizer create its state.
CHECKPOINT = "torch.distributed.checkpoint.state_dict"


class StepHook:
    """A hook before each step of an optimizer, once its gradients are there: a closure's at the closure's end.

    Args:
        optimizer: the optimizer; wrappers of Accelerate and Lightning are unwrapped.
        act: called before each step. The hook keeps it alive.

    Raises:
        TypeError: `optimizer` is something else.
        ValueError: there is a hook of this class on the optimizer already.
    """

    #: What is attached, for messages.
    kind: ClassVar[str]
    #: Whether these hooks come after those of other classes, whichever was registered first.
    last: ClassVar[bool] = False

    _hooks: ClassVar["weakref.WeakKeyDictionary[Optimizer, RemovableHandle]"]

    def __init_subclass__(cls) -> None:
        cls._hooks = weakref.WeakKeyDictionary()

    @classmethod
    def is_on(cls, optimizer: Any) -> bool:
        """Whether there is a hook of this class on an optimizer, or on the one inside a wrapper."""
        inner = unwrap(optimizer)
        return isinstance(inner, Optimizer) and inner in cls._hooks

    def __init__(self, optimizer: Optimizer, act: BeforeStep) -> None:
        inner = unwrap(optimizer)
        if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
            raise TypeError(f"attach() takes an optimizer of torch, not {type(optimizer).__name__}")
        if inner in self._hooks:
            raise ValueError(f"{self.kind} is attached to this optimizer already: detach() that one first")
        FusedClip.of(inner)  # registers a hook, which is not possible while hooks are called
        self._act = act
        self._optimizer = weakref.ref(inner)
        # A compiled step must not trace what the hook does: it reads the stack, and values on a CPU.
        self._hooks[inner] = inner.register_step_pre_hook(torch.compiler.disable(self._before_step))
        move_last(inner)

    def remove(self) -> None:
        """Remove the hook."""
        if (optimizer := self._optimizer()) is not None and optimizer in self._hooks:
            self._hooks.pop(optimizer).remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if _is_inner_step(optimizer) or ("closure" in kwargs and _creates_state()):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch passes the optimizer among args
        if not callable(closure):  # none, or an argument of a step that takes others
            self._act(optimizer, None)
            return None

        def longer_closure() -> Any:
            loss = closure()
            if optimizer not in self._hooks:  # detached in the closure
                return loss
            self._act(optimizer, _loss(loss))
            return loss

        if len(args) > 1:
            return (args[0], longer_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": longer_closure}


def _loss(value: Any) -> Tensor | None:
    """Return what a closure returned as a tensor, or `None` if it is no number. A truth value is none."""
    number = plain(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        return torch.tensor(float(number), dtype=torch.float64, device="cpu")
    return value if isinstance(value, Tensor) else None


def move_last(optimizer: Any) -> None:
    """Move the hooks of classes that come last behind all others. torch must not be calling its pre-hooks."""
    for hooks in (cls._hooks for cls in StepHook.__subclasses__() if cls.last):
        if optimizer in hooks:
            optimizer._optimizer_step_pre_hooks.move_to_end(hooks[optimizer].id)


class Attachment(StepHook):
    """The hook of a strategy on one optimizer, whose gradients it unscales, if a GradScaler left that to the step."""

    kind = "a strategy"
    #: What calls the strategy, for messages.
    caller: ClassVar[str] = "optimizer.step()"

    def __init__(self, optimizer: Optimizer, clip: BeforeStep) -> None:
        def act(inner: Optimizer, loss: Tensor | None) -> None:
            _unscale(inner)
            clip(inner, loss)

        super().__init__(optimizer, act)


class OptimizerShards:
    """The parameters of an optimizer, with the process groups over which they are sharded, in the order of the models.

    The modules are walked again only when the optimizer has other parameters than in the call before. With thousands of
    tensors, walking them takes a third of the time of their norms.

    Args:
        models: modules with some of the parameters, such as those of FSDP1; others come after them.
    """

    def __init__(self, models: Parameters) -> None:
        self._models = models
        self._parameters: list[Tensor] = []  # of the optimizer in the call before
        self._types: list[type] = []  # that they had: a plain parameter can become a DTensor in place
        self._shards: list[Shard] = []

    def __call__(self, optimizer: Any) -> list[Shard]:
        """Return the distinct parameters that can have gradients; `zclip.norm.parameters_of` says what it raises."""
        own = optimizer_parameters(optimizer)
        types = list(map(type, own))
        if types != self._types or not all(map(is_, own, self._parameters)):
            ids = set(map(id, own))
            self._shards = [each for each in parameters_of([self._models, own]) if id(each.parameter) in ids]
            self._parameters, self._types = own, types
        return self._shards


def _creates_state() -> bool:
    """Whether `torch.distributed.checkpoint` calls this step, by `step(closure=None)`, to make an optimizer's state.

    The stack tells, on all ranks alike. A step of training may have a rate of 0 too, or gradients of 0 on one rank.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != CHECKPOINT:
        frame = frame.f_back
    return frame is not None


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
