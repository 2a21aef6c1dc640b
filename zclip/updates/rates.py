"""Take one step of an optimizer at scaled learning rates: all rates by one factor, or each tensor's by its own.

torch's optimizers have one rate for a group of parameters. Where tensors have factors of their own, the groups are
split for the step. So the optimizer takes each step by itself, and only its rates are others: no weight is corrected
afterwards, and none is copied.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zclip.attach import StepHook, move_last

Group = dict[str, Any]
Undo = Callable[[], None]


class RateHook(StepHook):
    """Multiplies the learning rates of an optimizer by factors for one step, after every strategy has clipped.

    Args:
        optimizer: the optimizer.
        scales_of: called before each step with the optimizer. It returns 0-dim, a factor for all parameters, or (n,), a
            factor for each of the n parameters in the order of the groups; `None`: the rates stay as they are.
    """

    kind = "a rule over updates"
    last = True

    def __init__(self, optimizer: Optimizer, scales_of: Callable[[Optimizer], Tensor | None]) -> None:
        undo: list[Undo] = []

        def restore(*_: Any) -> None:
            while undo:
                undo.pop()()

        def act(inner: Optimizer, loss: Tensor | None) -> None:
            restore()  # after a step that has raised, if somebody has replaced `optimizer.step`
            scales = scales_of(inner)
            if scales is not None and not (scales.device.type == "cpu" and bool((scales == 1).all())):
                undo.append((_split_groups if scales.ndim else _scale_groups)(inner, scales))

        def after_step(inner: Optimizer, *_: Any) -> None:
            restore()
            move_last(inner)  # behind hooks that were registered since

        super().__init__(optimizer, act)
        self.restore = restore
        self._others = [
            optimizer.register_step_post_hook(after_step),
            optimizer.register_state_dict_pre_hook(restore),
            optimizer.register_load_state_dict_pre_hook(restore),
        ]
        post_hooks: Any = optimizer._optimizer_step_post_hooks
        post_hooks.move_to_end(self._others[0].id, last=False)  # a scheduler in another hook must not see the scale
        self._end_calls = call_after_step(optimizer, restore)

    def remove(self) -> None:
        """Remove the hooks, and restore the rates."""
        super().remove()
        self._end_calls()
        self.restore()
        for hook in self._others:
            hook.remove()


def call_after_step(optimizer: Optimizer, function: Undo) -> Undo:
    """Call a function after each step, whether it returns or raises; return what ends that.

    torch calls its hooks after steps that return. So `optimizer.step` is replaced, as torch's schedulers replace it.
    """
    reference = weakref.ref(optimizer)
    replaced = vars(optimizer).get("step")  # by a scheduler

    def method(inner: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return type(inner).step(inner, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)
        finally:
            function()

    def step(*args: Any, **kwargs: Any) -> Any:
        inner = reference()
        assert inner is not None
        return method(inner, *args, **kwargs)

    own: Any = step
    own.__dict__.update(getattr(replaced, "__dict__", {}))  # a scheduler looks for its mark
    own.__func__ = method  # that a scheduler calls which is made later
    own.__signature__ = inspect.signature(optimizer.step)
    optimizer.step = own  # type: ignore[method-assign]

    def end() -> None:
        inner = reference()
        if inner is not None and vars(inner).get("step") is own:
            del inner.step
            if replaced is not None:
                inner.step = replaced  # type: ignore[method-assign]

    return end


def _scale_groups(optimizer: Optimizer, scale: Tensor) -> Undo:
    """Multiply the rate of every group; return what restores them."""
    changed = [(group, group["lr"], scaled_rate(group, scale)) for group in optimizer.param_groups]
    for group, _, scaled in changed:
        group["lr"] = scaled

    def undo() -> None:
        for group, before, scaled in changed:
            if group["lr"] is scaled:  # nobody else has set it since
                group["lr"] = before

    return undo


def _split_groups(optimizer: Optimizer, scales: Tensor) -> Undo:
    """Give the optimizer a group for each rate; return what gives it back its own groups."""
    before, split = optimizer.param_groups, list[Group]()
    sizes = [len(group["params"]) for group in before]
    for group, part in zip(before, scales.split(sizes), strict=True):
        split += split_group(group, part)
    optimizer.param_groups = split

    known = len(split)

    def undo() -> None:
        if optimizer.param_groups is split:
            before.extend(split[known:])  # groups that were added after a step that has raised
            optimizer.param_groups = before

    return undo


def split_group(group: Group, scales: Tensor) -> list[Group]:
    """Return groups with the parameters of one, whose rates are multiplied by (n,) factors.

    Where the factors may be read, parameters with the same factor stay together.
    """
    if takes_tensor_rate(group, scales):
        rates = scaled_rate(group, scales).unbind()  # type: ignore[union-attr]
        return [{**group, "params": [p], "lr": rate} for p, rate in zip(group["params"], rates, strict=True)]
    by_scale: dict[float, list[Tensor]] = {}
    for parameter, scale in zip(group["params"], scales.tolist(), strict=True):
        by_scale.setdefault(scale, []).append(parameter)
    return [
        {**group, "params": parameters, "lr": group["lr"] if scale == 1 else group["lr"] * scale}
        for scale, parameters in by_scale.items()
    ]


def takes_tensor_rate(group: Mapping[str, Any], scale: Tensor) -> bool:
    """Whether the optimizer takes the rate of a group as a tensor on the accelerator, so that nothing waits for it."""
    return scale.device.type != "cpu" and bool(group.get("fused") or group.get("capturable"))


def scaled_rate(group: Mapping[str, Any], scale: Tensor) -> float | Tensor:
    """Return a parameter group's learning rate times a scale, in the form that its optimizer takes.

    A fused or capturable optimizer on an accelerator takes a tensor. Otherwise the scale is read, which waits for the
    device of `scale`.
    """
    rate = group["lr"]
    if takes_tensor_rate(group, scale):
        return (rate * scale).to(torch.float32)
    return rate * scale.to(rate) if isinstance(rate, Tensor) else rate * float(scale)
