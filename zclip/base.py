"""Base class of all strategies: a strategy implements its rule, and everything around the rule is here.

`ClippingStrategy.step` measures the norms of the gradients (`zclip.norm`), asks the rule for a decision, keeps
non-finite norms out of the statistics (`zclip.state`), and applies the decision (`zclip.apply`). A rule is a pure
function of tensors: it takes the statistics as a dict and returns new ones. An update can then be dropped by
`torch.where`, without a device sync, and the rule can be compiled.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from zclip.apply import (
    FusedClip,
    apply_decision,
    bind_optimizers,
    listed_optimizers,
    unwrap,
)
from zclip.arguments import ArgumentError, positive
from zclip.attach import Attachment, OptimizerShards
from zclip.decision import ClipResult, Decision, GradStats, State
from zclip.integrations.deepspeed import EngineAttachment, is_engine
from zclip.nonfinite import POLICY_CHECKS, NonFiniteMonitor, nonfinite_message
from zclip.norm import (
    Parameters,
    Shard,
    device_of,
    global_norm,
    listed,
    local_gradients,
    norm_like,
    parameters_of,
    scalar,
    statistics_dtype,
    tensor_norms,
)
from zclip.state import Statistics, check_names, where_finite

NO_GRADIENTS = (
    "no parameter has a gradient: call step() after loss.backward() and before optimizer.zero_grad(), "
    "on the module that was trained, with parameters that require gradients (DeepSpeed's engine keeps gradients to "
    "itself: use attach(engine))"
)
NOT_IN_ENGINE = "is not possible in DeepSpeed's engine: it gives one norm of all parameters"


class _NoGradients(ValueError):
    """No parameter that a step is to clip has a gradient."""


class Policy(TypedDict, total=False):
    """Keyword arguments that every strategy takes in addition to its own; see `ClippingStrategy`."""

    on_nonfinite: str
    max_consecutive_nonfinite: int | None
    scope: str | Sequence[str] | None


class ClippingStrategy(Statistics):
    """Base of all strategies. A subclass implements its rule, and `initial_state` if the rule has statistics.

    A rule over the global norm is `decide`. A rule over the norm of each tensor, the loss or the gradients is `clip`.
    The arguments of a subclass's `__init__` must be kept as attributes of the same names, because `state_dict` records
    them. What it takes as `**policy` and passes on is no argument: a saved state can be loaded under another policy,
    and `changes` then has the difference.

    A norm that is NaN or infinite, or has an infinite square, never enters the statistics. The policy decides what else
    happens on such a step.

    Args:
        max_grad_norm: upper bound on the norm after clipping, whatever the rule decides. Default `None`: no bound.
        on_nonfinite: "skip" (default), "zero" or "raise".

            - "skip": the optimizer passed to `step` skips its step, weight decay and momentum included. A fused
              optimizer gets a flag. On a CPU, the clipped parameters of any other optimizer have no gradients in its
              step. In other cases gradients are set to zero, as with "zero": if no optimizer is passed, and on an
              accelerator if the optimizer is not fused, or also holds parameters that are not clipped.
            - "zero": gradients are set to zero. Weight decay, momentum and Adam's moments still move the weights.
            - "raise": raise `FloatingPointError`, which names the first parameters with non-finite gradients. This
              waits for the device. In fp16 it also raises on overflows that a GradScaler would tolerate.
        max_consecutive_nonfinite: number of consecutive non-finite norms that raises `FloatingPointError`. Default 20;
            `None`: never. On an accelerator the counter is copied asynchronously and checked a step or two late. With
            `attach` and a GradScaler, an overflow counts only if the optimizer is fused. The scaler does not call
            the step of any other, so `telemetry` is that of the step before.
        scope: patterns of the names of the parameters that are measured, clipped and skipped, such as
            `["*.weight", "!embed*"]`; `!` excludes. Default `None`: all. Gradients of the others are left as they are,
            whatever they hold; `other_norm` is their norm. Of several names (tied weights) the first in alphabetical
            order counts. If several modules are given, names begin with their number: `1.embed.weight`.

            `"group:adamw"` is a pattern of groups of the optimizer's parameters, `"!group:muon"` one that excludes
            groups. The name of a group is its entry `name`, as in `dict(params=..., name="adamw")`, or else the name of
            the optimizer's class, such as `AdamW`. It needs the optimizer: `attach(optimizer)`, or
            `step(model, optimizer=[muon, adamw])`.

            A pattern that matches nothing gives a warning. A scope that matches nothing raises in the next step, and
            `changes` then does not list it. A saved state records the scope.

    These policies can be assigned between two steps, which `changes` records.

    Raises:
        ArgumentError: an argument, also of a subclass, is out of its range; `zclip.arguments.ArgumentError` is a
            `ValueError`.

    Statistics of tensors (`per_tensor`) are kept by the names of the parameters in the module given to `step`, without
    those of wrappers (DDP, FSDP, torch.compile). Each tensor finds its own later and in a saved state, whatever is
    frozen, added or reordered. One that has none, or has another shape, starts fresh, and so does one that a step was
    not given: give `step` the frozen ones too. Parameters given without their module have no names. In one process each
    keeps its statistics; those of a saved state must be of parameters of the same number, order and shapes.

    `telemetry` holds 0-dim tensors of the last step, on the gradients' device; `read_telemetry` returns them as floats,
    in one transfer. A strategy adds its own, which are NaN (or false) on a step whose norm is not finite.

    - `grad_norm`: the norm before clipping.
    - `clipped_norm`: the norm after clipping; 0 where the step is skipped.
    - `clipped`: whether the step is clipped or skipped.
    - `clipped_by_max`: whether `max_grad_norm` clipped it further than the rule.
    - `consecutive_clips`: number of consecutive clipped steps up to this one; non-finite steps do not count.
    - `nonfinite`, `consecutive_nonfinite`: number of non-finite norms, in total and consecutive.
    - `changes`: number of changes of arguments so far, at most 1,000, if there are any.
    - `other_norm`: the norm of the gradients that are not in the scope, if there is a scope.
    """

    #: Whether the rule uses the loss, if the caller passes it.
    uses_loss = False
    #: Whether the rule looks at the gradients themselves, besides their norms.
    needs_gradients = False

    _policies = POLICY_CHECKS
    on_nonfinite: str = "skip"
    max_consecutive_nonfinite: int | None = 20

    def __init__(self, max_grad_norm: float | None = None, **policy: Unpack[Policy]) -> None:
        unknown = policy.keys() - Policy.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}")
        super().__init__()
        self.max_grad_norm = positive("max_grad_norm", max_grad_norm, null="for no bound")
        for name, value in policy.items():
            setattr(self, name, value)
        self._check_policy()
        self._monitor = NonFiniteMonitor()
        self._attachment: Attachment | EngineAttachment | None = None

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the bound on the norm of this step, and the statistics after it.

        Args:
            norm: 0-dim float tensor, gradient norm before clipping, finite.
            state: statistics before this step; must not be changed in place.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decide(norm, state)")

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return how to scale the gradients of this step.

        By default the target is the minimum of `decide`'s target and `max_grad_norm`. If the norm is above it, all
        gradients are scaled by target / (norm + 1e-6), as in the published package.

        Args:
            stats: norms of this step, and the gradients behind them.
            state: statistics before this step; must not be changed in place.
        """
        norm = stats.norm
        decision = self.decide(norm, state)
        if not isinstance(decision, Decision):
            raise TypeError(f"{type(self).__name__}.decide must return a Decision, not {type(decision).__name__}")
        target = decision.target if self.max_grad_norm is None else decision.target.clamp(max=self.max_grad_norm)
        clipped = norm > target
        coefficient = torch.where(clipped, target / (norm + 1e-6), 1.0)
        telemetry = {"clipped_by_max": clipped & (target < decision.target), **decision.telemetry}
        return ClipResult(coefficient, norm * coefficient, clipped, decision.state, telemetry)

    def attach(self, optimizer: Any, *models: Parameters, process_group: dist.ProcessGroup | None = None) -> None:
        """Clip before every step of an optimizer, whatever loop calls it, until `detach`.

        The norm is that of the gradients with which the optimizer would step: after accumulation, and unscaled if a
        GradScaler is used. A closure's gradients are clipped at its end. A step without any gradient changes nothing.

        Strategies that use the loss get that of a closure, which is the last micro-batch's in Lightning. They get none
        without a closure, and none in several processes, where each has the loss of its own batch.

        In DeepSpeed's engine with ZeRO 1, 2 or 3 the strategy takes the place of `gradient_clipping`. It gets the
        engine's norm, unless the engine skips the step itself, because the norm is not finite. Where the strategy skips
        one, gradients are zero, so weight decay and momentum still move the weights.

        Args:
            optimizer: an optimizer of torch, or a DeepSpeed engine; wrappers of Accelerate and Lightning are unwrapped.
                All of its parameters are clipped, also those that are added later.
            models: modules that hold these parameters. Strategies with statistics for each tensor keep them by the
                names that parameters have here, and FSDP1 needs its module. Default: none.
            process_group: see `step`.

        Raises:
            TypeError: `optimizer` is something else, or has not called `Optimizer.__init__`.
            ValueError: this strategy is attached already, another one is attached to the optimizer, the models hold
                none of its parameters, or none is in the scope; or the engine is not one of ZeRO, or the strategy needs
                more than a norm. In the optimizer's step also what `step` raises.
        """
        if self._attachment is not None:
            raise ValueError(f"this {type(self).__name__} is attached already: detach() it, or make one for each")
        if is_engine(optimizer):
            if self.per_tensor or self.needs_gradients or self.scope is not None:
                raise ValueError(f"{type(self).__name__ if self.scope is None else 'a scope'} {NOT_IN_ENGINE}")
            self._attachment = EngineAttachment(optimizer, self._observe)
            return
        models = tuple(map(listed, models))
        inner = unwrap(optimizer)
        own_ids = {id(p) for group in getattr(inner, "param_groups", ()) for p in group["params"]}
        if models and own_ids and own_ids.isdisjoint(id(shard.parameter) for shard in parameters_of(models)):
            raise ValueError("the models hold no parameter of the optimizer: give attach() the module that it trains")

        shards_of = OptimizerShards(models)

        def clip(inner: Optimizer, loss: Tensor | None) -> None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                loss = None  # other ranks may have another one, and would decide otherwise
            with suppress(_NoGradients):  # the optimizer then has nothing to do either
                self._step(shards_of(inner), models, [inner], loss, process_group)

        if own_ids and self.scope is not None:
            self._in_scope(shards_of(inner), models, [inner], process_group)  # a mistake in the scope raises
        self._attachment = Attachment(optimizer, clip)

    def _check_takes_scope(self, scope: object) -> None:
        super()._check_takes_scope(scope)
        if isinstance(self.__dict__.get("_attachment"), EngineAttachment):
            raise ArgumentError("scope", scope, NOT_IN_ENGINE)

    def detach(self) -> None:
        """End what `attach` began; nothing happens if this strategy is not attached."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def step(
        self,
        *models: Parameters,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        loss: Tensor | float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Clip the gradients. Call it after backward, accumulation and unscaling, before the optimizer.

        Args:
            models: modules, parameters, or iterables of either. One norm is taken over all of their gradients, also of
                parameters that are frozen by now, and the statistics are updated once. If parameters are sharded, call
                `step` on all ranks.
            optimizer: the optimizer, or several, that will step next; wrappers of Accelerate and Lightning are
                unwrapped. A fused one (`AdamW(fused=True)`) applies the coefficient inside its step, and its gradients
                stay unscaled until then. Gradients are scaled in place for other optimizers, for optimizers that
                hold parameters not among the models', and by strategies with a coefficient for each tensor. Default
                `None`: gradients are scaled in place, and a skipped step has zero gradients.
            loss: 0-dim tensor or a number, for strategies that use it; must be the same on every rank. Default `None`.
            process_group: ranks that hold other parameters of the same model (pipeline stages). The norm is taken over
                all of them, and all make the same decision. Default `None`: no such ranks.

        Returns:
            The norm before clipping, a 0-dim float32 tensor on the gradients' device.

        Raises:
            ValueError: no parameter has a gradient, or none of any rank is in the scope; two strategies clip for one
                optimizer's step; statistics of tensors are of other parameters; or the module of FSDP1 is missing.
            TypeError: an argument has the wrong type, or a gradient is sparse, complex, or not on its parameter's mesh.
            FloatingPointError: see `on_nonfinite` and `max_consecutive_nonfinite`.
        """
        self._check_initialised()
        self._check_not_attached("step()")
        optimizers = listed_optimizers(optimizer)
        if any(map(Attachment.is_on, optimizers)):
            raise ValueError("a strategy is attached to an optimizer of these: leave out step(), or detach() that one")
        models = tuple(map(listed, models))
        return self._step(parameters_of(models), models, optimizers, loss, process_group)

    def _check_not_attached(self, call: str) -> None:
        if self._attachment is not None:
            words = "calls the strategy that is attached to it: leave out"
            raise ValueError(f"{self._attachment.caller} {words} {call}")

    def _step(
        self,
        shards: Sequence[Shard],
        models: Parameters,
        optimizers: Sequence[Optimizer],
        loss: Tensor | float | None,
        process_group: dist.ProcessGroup | None,
    ) -> Tensor:
        with torch.no_grad():
            FusedClip.cancel_all(self)
            shards, others = self._in_scope(shards, models, optimizers, process_group)
            gradients = local_gradients([shard.parameter for shard in shards])
            no_gradients = all(gradient is None for gradient in gradients)
            if no_gradients and process_group is None and not any(shard.groups for shard in shards):
                raise _NoGradients(NO_GRADIENTS)
            norms = tensor_norms(shards, gradients) if shards else _no_norms(others, process_group)
            norm = global_norm(norms, process_group)
            if no_gradients and norm.device.type == "cpu" and norm == 0:
                raise _NoGradients(NO_GRADIENTS)
            loss = scalar("loss", loss, norm.device) if self.uses_loss and loss is not None else None
            targets = bind_optimizers(optimizers, shards, owner=self)
            stats = GradStats(norm, norms, loss, shards, gradients, process_group)
            coefficients, skip, finite = self._update(stats, models)
            if self.scope is not None:
                self.telemetry["other_norm"] = norm_like(norm, others, process_group)
            apply_decision(coefficients, skip, ~finite if self.on_nonfinite == "zero" else None, targets, stats)
            return norm.to(torch.float32)

    def observe(self, norm: Tensor | float, loss: Tensor | float | None = None) -> Tensor:
        """Update the statistics with one norm, without gradients, and return the coefficient for that norm.

        Strategies with statistics for each tensor see a single tensor.

        Args:
            norm: a 0-dim tensor, or a number, whose statistics are on the CPU. NaN or infinity does not change them. A
                number below 0 counts as NaN. A DTensor is reduced over its mesh, so all of its ranks must call.
            loss: a 0-dim tensor or a number, for strategies that use it. Default `None`.

        Returns:
            0-dim tensor on the device of the norm; 0 where the step would be skipped. Then set gradients to zero, which
            a product with NaN would not: `zclip.apply.scale_(gradients, coefficient, coefficient == 0)`.

        Raises:
            TypeError: an argument is not a real number, or a tensor of one.
            ValueError: this strategy is attached, or has a scope: the caller chooses of which parameters the norm is.
        """
        self._check_initialised()
        self._check_not_attached("observe()")
        return self._observe(norm, loss)

    def _observe(self, norm: Tensor | float, loss: Tensor | float | None = None) -> Tensor:
        """Do what `observe` does; an engine calls it for the strategy that is attached to it."""
        with torch.no_grad():
            if self.scope is not None:
                raise ValueError(f"scope={self.scope} is not possible where only a norm is known: it must be None")
            norm = scalar("norm", norm)
            norm = torch.where(norm < 0, torch.nan, norm.to(statistics_dtype(norm.device)))
            loss = scalar("loss", loss, norm.device) if self.uses_loss and loss is not None else None
            coefficient, skip, _ = self._update(GradStats(norm, norm.reshape(1), loss))
            assert isinstance(coefficient, Tensor)
            return torch.where(skip, 0.0, coefficient.reshape(()))

    def _update(self, stats: GradStats, models: Parameters = ()) -> tuple[Tensor | Sequence[Tensor], Tensor, Tensor]:
        """Update the statistics and telemetry; return coefficients, whether to skip, and whether the norm is finite."""
        norm = stats.norm
        finite = torch.isfinite(norm.square())  # statistics hold squares
        if self.on_nonfinite == "raise" and not finite:
            raise FloatingPointError(nonfinite_message(stats, self._names(models)))
        self._prepare_state(stats.norms if self.per_tensor else norm, stats.shards, models)
        safe = stats._replace(norm=torch.where(finite, norm, 1.0), norms=torch.where(finite, stats.norms, 1.0))
        result = self.clip(safe, self.state)
        telemetry = {key: where_finite(finite, value, norm.dtype) for key, value in result.telemetry.items()}
        skip = ~finite if result.skip is None else ~finite | result.skip
        self._advance(result.state, kept=finite, finite=finite, clipped=result.clipped | skip)
        own = {
            "grad_norm": norm,
            "clipped_norm": torch.where(skip, 0.0, result.clipped_norm),
            "clipped": result.clipped | skip,
            "clipped_by_max": torch.zeros_like(finite),
            **{key: value.clone() for key, value in self.counters.items()},
        }
        check_names(self, own.keys() - {"clipped_by_max"} | {"changes", "other_norm"}, telemetry)
        self.telemetry = {**own, **telemetry, **self._count_of_changes("changes", norm)}
        self._monitor.update(self.counters["consecutive_nonfinite"], self.max_consecutive_nonfinite)
        return result.coefficients, skip, finite

    def _shown(self) -> dict[str, Any]:
        """Return the arguments, and the policies that are not the default ones."""
        default = {"on_nonfinite": "skip", "max_consecutive_nonfinite": 20, "scope": None}
        policy = {name: getattr(self, name) for name in default}
        return self.config() | {name: value for name, value in policy.items() if value != default[name]}

    def _check_policy(self) -> None:
        for name, check in self._policies.items():  # a subclass may have a class attribute of this name
            check(getattr(self, name))

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the objects of this process: device events, the module and its parameters."""
        of_process: dict[str, Any] = {
            "_monitor": NonFiniteMonitor(),
            "_naming_module": None,
            "_objects": [],
            "_attachment": None,
        }
        return {**self.__dict__, **of_process}


def _no_norms(others: Sequence[Shard], process_group: dist.ProcessGroup | None) -> Tensor:
    """Return the norm of one tensor without a gradient, for a rank that has nothing to clip: (1,)."""
    device = device_of(others, process_group)
    return torch.zeros(1, dtype=statistics_dtype(device), device=device)
