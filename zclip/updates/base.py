"""Base class of rules over the update of an optimizer: what `u` is in `p <- p - lr * u`.

A rule is attached to an optimizer. Before each step it measures the norm of the update (`zclip.updates.norm`) and
decides on a scale, by which the step's learning rate is multiplied. After the step the rate is what it was.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from zclip.apply import unwrap
from zclip.attach import StepHook, move_last
from zclip.decision import State
from zclip.norm import scalar, statistics_dtype
from zclip.state import Statistics, where_finite
from zclip.updates.norm import check_optimizer, update_norm


class UpdateDecision(NamedTuple):
    """Result of a rule for one step.

    Attributes:
        scale: 0-dim, factor on the learning rate of this step, from 0 to 1; `None`: the rate stays as it is.
        clipped: 0-dim bool, whether the rule acts on this step.
        bound: 0-dim, upper bound on the norm of the scaled update; `inf` where there is none.
        state: statistics after this step, with the keys and shapes of the state that was passed in.
        telemetry: 0-dim tensors to record, by name. Default: none.
    """

    scale: Tensor | None
    clipped: Tensor
    bound: Tensor
    state: State
    telemetry: Mapping[str, Tensor] = MappingProxyType({})


class UpdateRule(Statistics):
    """Base of rules over the norm of an optimizer's update, such as Adam's `m / (sqrt(v) + eps)`.

    A subclass implements `decide`, and `initial_state` if it has statistics. It keeps the arguments of its `__init__`
    as attributes of the same names. The rule goes together with any `ClippingStrategy`, attached or called, which
    always acts first: the rule sees the update of the clipped gradients.

    The scale multiplies the learning rate of all parameter groups for one step. Decoupled weight decay is scaled with
    it, as by a schedule in torch; an L2 penalty is a part of the update. Between the steps the groups have their own
    rates, so schedulers and saved optimizer states never see the scale. If a step raises, the rates are restored before
    the next one, before the optimizer's state is saved, and by `detach`; a scheduler must not step before that. A
    pre-hook of the optimizer that sets rates must be registered before the rule is attached.

    On a CPU a scale of 1 leaves the rate untouched. On an accelerator nothing waits for the device if the optimizer is
    fused or capturable: the rate of the step is then a float32 tensor. For other optimizers each step waits once.

    A step that a GradScaler or a strategy skips, one without gradients, and a norm of NaN or infinity change no
    statistics, and the rate stays as it is.

    `telemetry` holds 0-dim tensors of the last step, and `read_telemetry` returns them as floats. They are NaN (or
    false) on a step that changes no statistics.

    - `update_norm`: the norm of the update before scaling.
    - `update_scale`: the factor on the learning rate.
    - `update_clipped`: whether the rule acted on this step.
    - `update_bound`: the upper bound on the norm of the scaled update; `inf` without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hook: _RuleHook | None = None

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Return the scale of this step, and the statistics after it.

        Args:
            norm: 0-dim float tensor, norm of the update, finite and above 0.
            state: statistics before this step; must not be changed in place.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decide(norm, state)")

    def attach(self, optimizer: Any, process_group: dist.ProcessGroup | None = None) -> None:
        """Act on every step of an optimizer, whatever loop calls it, until `detach`.

        Args:
            optimizer: `torch.optim.Adam`, `AdamW` or `SGD`; wrappers of Accelerate and Lightning are unwrapped. Each of
                several optimizers needs a rule of its own.
            process_group: ranks that hold other parameters of the same model, such as pipeline stages. Default: none.

        Raises:
            TypeError: `optimizer` is another one, or FSDP1 has flattened its parameters.
            ValueError: this rule is attached already, or another one is attached to the optimizer.
        """
        self._check_initialised()
        if self._hook is not None:
            raise ValueError(f"this {type(self).__name__} is attached already: detach() it, or make one for each")
        inner = unwrap(optimizer)
        check_optimizer(inner)

        def scale_of(optimizer: Optimizer) -> Tensor | None:
            found_inf = getattr(optimizer, "found_inf", None)
            return self._update(update_norm(optimizer, process_group=process_group), found_inf)

        self._hook = _RuleHook(inner, scale_of)

    def detach(self) -> None:
        """End what `attach` began; nothing happens if this rule is not attached."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def observe(self, norm: Tensor) -> Tensor:
        """Update the statistics with one norm, without an optimizer, and return the scale for that step.

        Args:
            norm: 0-dim tensor; 0, NaN and infinity do not change the statistics.

        Returns:
            0-dim tensor; 1 where nothing is to be scaled.

        Raises:
            TypeError: the norm is not a tensor of one real number.
        """
        norm = scalar("norm", norm)
        scale = self._update(norm.to(statistics_dtype(norm.device)))
        return torch.ones_like(self.telemetry["update_norm"]) if scale is None else scale

    def _update(self, norm: Tensor, found_inf: Tensor | None = None) -> Tensor | None:
        """Update statistics and telemetry; return the scale, 1 where the step does not count."""
        with torch.no_grad():
            finite = torch.isfinite(norm.square())
            counts = finite & (norm > 0)
            if found_inf is not None:
                counts &= found_inf.to(norm.device, non_blocking=True).reshape(()) == 0
            self._prepare_state(norm, (), ())
            decision = self.decide(torch.where(counts, norm, 1.0), self.state)
            self._check(decision)
            scale = torch.ones_like(norm) if decision.scale is None else decision.scale
            telemetry = {
                "update_norm": norm,
                "update_scale": scale,
                "update_clipped": decision.clipped,
                "update_bound": decision.bound,
                **decision.telemetry,
            }
            telemetry = {key: where_finite(counts, value, norm.dtype) for key, value in telemetry.items()}
            self._advance(decision.state, kept=counts, finite=finite, clipped=decision.clipped)
            self.telemetry = telemetry
            return None if decision.scale is None else torch.where(counts, scale, 1.0)

    def _check(self, decision: Any) -> None:
        name = type(self).__name__
        if not isinstance(decision, UpdateDecision):
            raise TypeError(f"{name}.decide must return an UpdateDecision, not {type(decision).__name__}")
        values = {**decision.state, **decision.telemetry, "clipped": decision.clipped, "bound": decision.bound}
        if decision.scale is not None:
            values["scale"] = decision.scale
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}.decide must return tensors: {key} is {value!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what belongs to an optimizer of this process."""
        return {**self.__dict__, "_hook": None}


class _RuleHook(StepHook):
    """Multiplies the learning rates of an optimizer by a scale for one step, after every strategy has clipped."""

    kind = "a rule over updates"
    last = True

    def __init__(self, optimizer: Optimizer, scale_of: Callable[[Optimizer], Tensor | None]) -> None:
        rates: list[tuple[dict[str, Any], Any, Any]] = []  # groups, with their rates before and in the step

        def restore(*_: Any) -> None:
            for group, before, scaled in rates:
                if group["lr"] is scaled:  # nobody else has set it since
                    group["lr"] = before
            rates.clear()

        def act(inner: Optimizer, loss: Tensor | None) -> None:
            restore()  # after a step that has raised
            scale = scale_of(inner)
            if scale is None or (scale.device.type == "cpu" and scale == 1):
                return
            for group in inner.param_groups:
                rates.append((group, group["lr"], scaled_rate(group, scale)))
                group["lr"] = rates[-1][2]

        def after_step(inner: Optimizer, *_: Any) -> None:
            restore()
            move_last(inner)  # behind hooks that were registered since

        super().__init__(optimizer, act)
        self.restore = restore
        self._others = [
            optimizer.register_step_post_hook(after_step),
            optimizer.register_state_dict_pre_hook(restore),
        ]
        post_hooks: Any = optimizer._optimizer_step_post_hooks
        post_hooks.move_to_end(self._others[0].id, last=False)  # a scheduler in another hook must not see the scale

    def remove(self) -> None:
        """Remove the hooks, and restore the rates."""
        super().remove()
        self.restore()
        for hook in self._others:
            hook.remove()


def scaled_rate(group: Mapping[str, Any], scale: Tensor) -> float | Tensor:
    """Return a parameter group's learning rate times a scale, in the form that its optimizer takes.

    A fused or capturable optimizer on an accelerator takes a tensor. Otherwise the scale is read, which waits for the
    device of `scale`.
    """
    rate = group["lr"]
    on_device = scale.device.type != "cpu" and (group.get("fused") or group.get("capturable"))
    if on_device:
        return (rate * scale).to(torch.float32)
    return rate * scale.to(rate) if isinstance(rate, Tensor) else rate * float(scale)
