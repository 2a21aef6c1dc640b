"""Base classes of rules over the update of an optimizer: what `u` is in `p <- p - lr * u`.

A rule is attached to an optimizer and acts before each of its steps, once the gradients are clipped. An `UpdateRule`
measures the norm of the update (`zclip.updates.norm`) and decides on a scale, by which the step's learning rate is
multiplied (`zclip.updates.rates`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from zclip.apply import optimizer_parameters, unwrap
from zclip.decision import State
from zclip.norm import scalar, statistics_dtype
from zclip.state import Statistics, check_names, where_finite
from zclip.updates.norm import check_optimizer, update_norm
from zclip.updates.rates import RateHook
from zclip.updates.scales import ScaleCheck, check_shape


class UpdateDecision(NamedTuple):
    """Result of a rule for one step.

    Attributes:
        scale: 0-dim, factor on the learning rate of this step, above 0 and at most 1; `None`: the rate stays as it is.
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


class OptimizerRule(Statistics):
    """Base of everything that acts on each step of one optimizer, after every strategy has clipped its gradients.

    A subclass implements `before_step`. It keeps the arguments of its `__init__` as attributes of the same names. The
    rule goes together with any `ClippingStrategy`, attached or called, which always acts first.

    Between the steps the groups have their own rates, also after a step that has raised. So schedulers and saved
    optimizer states never see a scale. `attach` replaces `optimizer.step` for that, as torch's schedulers do. A program
    that replaces it again, as Accelerate does in fp16, must not step a scheduler after a step that has raised. A
    pre-hook of the optimizer that sets rates must be registered before the rule is attached.

    Factors on rates are above 0 and at most 1, also those of a rule of your own. Where the optimizer takes its step,
    the first other one raises `ValueError`. On an accelerator it counts as 1, and the error comes a step or two late,
    because nothing waits for the device.

    `telemetry` holds 0-dim tensors of the last step, and `read_telemetry` returns them as floats. They are NaN (or
    false) on a step that changes no statistics. `update_changes` is the number of changes of arguments so far, if there
    are any.
    """

    #: Optimizers whose steps the rule knows: classes of `torch.optim`.
    optimizers: tuple[type[Optimizer], ...] = (Adam, SGD)
    takes_scope = False

    def __init__(self) -> None:
        super().__init__()
        self._hook: RateHook | None = None
        self._scale_check = ScaleCheck()

    def before_step(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> Tensor | None:
        """Act on the step that an optimizer is about to take; it may change the gradients in place.

        Args:
            optimizer: the optimizer, whose gradients are those of the step. A fused one divides them by its
                `grad_scale`, if it is set, and skips the step where its `found_inf` is not 0.
            process_group: ranks that hold other parameters of the same model, such as pipeline stages.

        Returns:
            The factors on the learning rates of this step, above 0 and at most 1: 0-dim for all parameters, or (n,) for
            each of them in the order of the groups; `None`: the rates stay as they are.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement before_step(optimizer, process_group)")

    def attach(self, optimizer: Any, process_group: dist.ProcessGroup | None = None) -> None:
        """Act on every step of an optimizer, whatever loop calls it, until `detach`.

        Args:
            optimizer: one of `optimizers`, or a subclass with the same update; wrappers of Accelerate and Lightning are
                unwrapped. Each of several optimizers needs a rule of its own.
            process_group: ranks that hold other parameters of the same model, such as pipeline stages. Default: none.

        Raises:
            TypeError: `optimizer` is another one, or FSDP1 has flattened its parameters.
            ValueError: this rule is attached already, or another one is attached to the optimizer.
        """
        self._check_initialised()
        if self._hook is not None:
            raise ValueError(f"this {type(self).__name__} is attached already: detach() it, or make one for each")
        inner = unwrap(optimizer)
        check_optimizer(inner, self.optimizers, type(self).__name__)
        self._hook = RateHook(inner, lambda stepping: self._checked_scales(stepping, process_group))

    def detach(self) -> None:
        """End what `attach` began; nothing happens if this rule is not attached."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _checked_scales(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> Tensor | None:
        """Return what `before_step` returns, checked, with 1 in place of factors that are not allowed."""
        scales = self.before_step(optimizer, process_group)
        method = f"{type(self).__name__}.before_step"
        check_shape(method, scales, len(optimizer_parameters(optimizer)))
        if scales is None:
            return None
        valid = self._scale_check.valid(method, scales, takes_step(optimizer, scales.device))
        return torch.where(valid, scales, 1.0)

    def _record(
        self, telemetry: Mapping[str, Tensor], state: State, *, counts: Tensor, finite: Tensor, clipped: Tensor
    ) -> None:
        """Replace the statistics and the telemetry of the last step, where it counts.

        Args:
            telemetry: 0-dim tensors; the first has the dtype of statistics.
            state: statistics after this step.
            counts: 0-dim bool, whether the step changes statistics.
            finite: 0-dim bool, whether the gradients are finite.
            clipped: 0-dim bool, whether the rule acts on this step.
        """
        dtype = next(iter(telemetry.values())).dtype
        values = {key: where_finite(counts, value, dtype) for key, value in telemetry.items()}
        self._advance(state, kept=counts, finite=finite, clipped=clipped)
        self.telemetry = values | self._count_of_changes("update_changes", next(iter(values.values())))

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what belongs to an optimizer of this process."""
        return {**self.__dict__, "_hook": None, "_scale_check": ScaleCheck()}


def takes_step(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Return whether an optimizer will take its step, 0-dim bool: a GradScaler or a strategy may make it skip."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return found_inf.to(device, non_blocking=True).reshape(()) == 0


class UpdateRule(OptimizerRule):
    """Base of rules over the norm of an optimizer's update, such as Adam's `m / (sqrt(v) + eps)`.

    A subclass implements `decide`, and `initial_state` if it has statistics. See `OptimizerRule` for what all rules
    have in common. The rule sees the update of the clipped gradients.

    The scale multiplies the learning rate of all parameter groups for one step. Decoupled weight decay is scaled with
    it, as by a schedule in torch; an L2 penalty is a part of the update.

    On a CPU a scale of 1 leaves the rate untouched. On an accelerator nothing waits for the device if the optimizer is
    fused or capturable: the rate of the step is then a float32 tensor. For other optimizers each step waits once.

    A step that a GradScaler or a strategy skips, one without gradients, and a norm of NaN or infinity change no
    statistics, and the rate stays as it is. So does, on an accelerator, a step whose scale is not allowed.

    Telemetry:

    - `update_norm`: the norm of the update before scaling.
    - `update_scale`: the factor on the learning rate.
    - `update_clipped`: whether the rule acted on this step.
    - `update_bound`: the upper bound on the norm of the scaled update; `inf` without one.
    """

    def decide(self, norm: Tensor, state: State) -> UpdateDecision:
        """Return the scale of this step, and the statistics after it.

        Args:
            norm: 0-dim float tensor, norm of the update, finite and above 0.
            state: statistics before this step; must not be changed in place.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decide(norm, state)")

    def before_step(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> Tensor | None:
        """Measure the update, and return the scale."""
        norm = update_norm(optimizer, process_group=process_group)
        return self._update(norm, takes_step(optimizer, norm.device))

    def observe(self, norm: Tensor | float) -> Tensor:
        """Update the statistics with one norm, without an optimizer, and return the scale for that step.

        A rule of your own that measures something else calls it in its `before_step`.

        Args:
            norm: a 0-dim tensor, or a number, whose statistics are on the CPU. NaN, infinity and numbers up to 0 do not
                change them.

        Returns:
            0-dim tensor; 1 where nothing is to be scaled.

        Raises:
            TypeError: the norm is not a real number, or a tensor of one.
            ValueError: the rule's scale is not above 0 and at most 1.
        """
        self._check_initialised()
        norm = scalar("norm", norm)
        norm = norm.to(statistics_dtype(norm.device))
        scale = self._update(norm, torch.ones_like(norm, dtype=torch.bool))
        return torch.ones_like(self.telemetry["update_norm"]) if scale is None else scale

    def _update(self, norm: Tensor, steps: Tensor) -> Tensor | None:
        """Update statistics and telemetry; return the scale, 1 where the step does not count."""
        with torch.no_grad():
            finite = torch.isfinite(norm.square())
            counts = finite & (norm > 0) & steps
            self._prepare_state(norm, (), ())
            decision = self.decide(torch.where(counts, norm, 1.0), self.state)
            self._check(decision)
            scale = torch.ones_like(norm) if decision.scale is None else decision.scale
            if decision.scale is not None:
                counts = counts & self._scale_check.valid(f"{type(self).__name__}.decide", scale, counts)
            own = {
                "update_norm": norm,
                "update_scale": scale,
                "update_clipped": decision.clipped,
                "update_bound": decision.bound,
            }
            check_names(self, own.keys() | {"update_changes"}, decision.telemetry)
            self._record(
                {**own, **decision.telemetry}, decision.state, counts=counts, finite=finite, clipped=decision.clipped
            )
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
            if value.ndim and key not in decision.state:
                raise TypeError(f"{name}.decide must return 0-dim tensors: {key} has the shape {list(value.shape)}")
