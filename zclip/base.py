"""What every clipping strategy shares, so that a strategy is nothing but its rule.

`ClippingStrategy.step` measures the gradients' norms (`zclip.norm`), asks the rule for a decision, keeps what is not
finite out of the statistics, and applies the decision (`zclip.apply`). A rule is a pure function of tensors:
statistics come in as a dict and go out as a new one, so an update can be dropped by `torch.where` instead of by
asking the host, and the rule can be compiled. A rule over the global norm implements `decide`; one that sees each
tensor's norm, the loss or the gradients themselves implements `clip`.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from zclip.apply import Fold, carry_out, claim, innermost
from zclip.nonfinite import POLICIES, Watch, fault, names_of
from zclip.norm import Parameters, Shard, global_norm, local_gradient, parameters_of, tensor_norms

State = dict[str, Tensor]


class Decision(NamedTuple):
    """What a rule over the global norm answers to one norm.

    Attributes:
        target: 0-dim tensor, the norm the gradients may keep; `inf` where the rule does not clip.
        state: the statistics after this step, with the keys and shapes of the state that came in.
        telemetry: 0-dim tensors worth recording, by name.
    """

    target: Tensor
    state: State
    telemetry: Mapping[str, Tensor] = MappingProxyType({})


class Measured(NamedTuple):
    """What a rule can see of one step.

    Attributes:
        norm: 0-dim, the global norm before clipping, finite.
        norms: (n,) norm of each whole gradient, finite; 0 where there is none.
        loss: 0-dim, the step's loss, if the caller gave it.
        shards: the n parameters; empty where only a norm is known.
        gradients: this rank's part of each gradient, `None` where there is none.
        process_group: ranks that hold other parameters of the same model, such as pipeline stages.
    """

    norm: Tensor
    norms: Tensor
    loss: Tensor | None = None
    shards: Sequence[Shard] = ()
    gradients: Sequence[Tensor | None] = ()
    process_group: dist.ProcessGroup | None = None

    def everywhere(self, value: Tensor) -> Tensor:
        """Return the sum of a 0-dim value over the ranks of `process_group`."""
        if self.process_group is not None:
            value = value.to(self.norm.dtype, copy=True)
            dist.all_reduce(value, group=self.process_group)
        return value


class Clipping(NamedTuple):
    """What any rule answers to one step.

    Attributes:
        coefficients: 0-dim for all gradients, (n,) one for each, or n tensors that broadcast to the gradients.
        clipped_norm: 0-dim, the global norm afterwards.
        clipped: 0-dim bool, whether anything was scaled.
        state: the statistics after this step, with the keys and shapes of the state that came in.
        telemetry: 0-dim tensors worth recording, by name.
        skip: 0-dim bool, whether the optimizer must not step; `None`: it steps.
    """

    coefficients: Tensor | Sequence[Tensor]
    clipped_norm: Tensor
    clipped: Tensor
    state: State
    telemetry: Mapping[str, Tensor] = MappingProxyType({})
    skip: Tensor | None = None


class Policy(TypedDict, total=False):
    """What any strategy takes as keyword arguments on top of its own; see `ClippingStrategy`."""

    on_nonfinite: str
    max_consecutive_nonfinite: int | None


class ClippingStrategy:
    """Base of all strategies: a subclass implements `decide` (or `clip`), and `initial_state` if it keeps statistics.

    The arguments of a subclass's `__init__` must be kept as attributes of the same names: `state_dict` records them.
    What it takes as `**policy` and hands on is not recorded: a saved state goes on under another policy.

    A norm that is NaN or infinite never enters the statistics. What else happens then is the policy.

    Args:
        max_grad_norm: upper bound on the norm after clipping, whatever the rule decides. `None` (default): no bound.
        on_nonfinite: "skip" (default), "zero" or "raise". "skip": the optimizer that was given to `step` does nothing,
            no weight decay and no momentum either (a fused one is told so; on a CPU any other finds no gradients).
            Where none was given, or one that is not fused on an accelerator, or one that also holds parameters
            `step` was not given, the gradients become zero instead, as with "zero"; weight decay, momentum and
            Adam's moments then still move the weights. "raise": `FloatingPointError` naming the first parameters at
            fault; this waits for the device, and in fp16 every overflow that a GradScaler would bear raises.
        max_consecutive_nonfinite: so many in a row raise `FloatingPointError` with advice. Default 20; `None`: never.
            On an accelerator the count is looked at when a copy of it has arrived, a step or two late.

    Raises:
        ValueError: an argument is out of its range.

    `telemetry` holds 0-dim tensors of the last step, on the gradients' device; `read_telemetry` brings them over
    together, as floats. A strategy adds its own, which are NaN (or false) on a step whose norm is not finite.

    - `grad_norm`: the norm before clipping.
    - `clipped_norm`: the norm after it; 0 where the step is skipped.
    - `clipped`: whether the step is clipped or skipped.
    - `clipped_by_max`: whether `max_grad_norm` clipped it further than the rule.
    - `consecutive_clips`: clipped steps in a row up to this one; steps that are not finite do not count.
    - `nonfinite`, `consecutive_nonfinite`: norms that were not finite, so far and in a row.
    """

    #: Version of the saved state's layout.
    version = 1
    #: Whether the statistics are one for each tensor: `initial_state` is then given (n,) zeros.
    per_tensor = False
    #: Whether the rule looks at the loss, if it is given.
    uses_loss = False

    on_nonfinite: str = "skip"
    max_consecutive_nonfinite: int | None = 20

    def __init__(self, max_grad_norm: float | None = None, **policy: Unpack[Policy]) -> None:
        unknown = policy.keys() - Policy.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}")
        if max_grad_norm is not None:
            allowed = "a number above 0, or null for no bound"
            require(is_number(max_grad_norm) and max_grad_norm > 0, "max_grad_norm", max_grad_norm, allowed)
        self.max_grad_norm = max_grad_norm
        for name, value in policy.items():
            setattr(self, name, value)
        self._check_policy()
        self.state: State = {}
        self.counters: State = {}
        self.telemetry: dict[str, Tensor] = {}
        self._pending: list[Fold] = []
        self._watch = Watch()
        self._named: nn.Module | None = None  # knows the names of parameters that are given without

    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the norm the gradients may keep and the statistics after this step.

        Args:
            norm: 0-dim float tensor, the gradient norm before clipping, finite.
            state: the statistics before this step; not to be changed in place.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decide(norm, state)")

    def initial_state(self, like: Tensor) -> State:
        """Return the statistics before the first step, on the device and in the dtype of `like`, a 0-dim zero."""
        return {}

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Return how the gradients are scaled.

        By default all by target / (norm + 1e-6) where the norm is above the target that `decide` and `max_grad_norm`
        allow, as the published package does.
        """
        norm = measured.norm
        decision = self.decide(norm, state)
        if not isinstance(decision, Decision):
            raise TypeError(f"{type(self).__name__}.decide must return a Decision, not {type(decision).__name__}")
        target = decision.target if self.max_grad_norm is None else decision.target.clamp(max=self.max_grad_norm)
        clipped = norm > target
        coefficient = torch.where(clipped, target / (norm + 1e-6), 1.0)
        telemetry = {"clipped_by_max": clipped & (target < decision.target), **decision.telemetry}
        return Clipping(coefficient, norm * coefficient, clipped, decision.state, telemetry)

    @torch.no_grad()
    def step(
        self,
        *models: Parameters,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        loss: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Clip the gradients. Call it after backward, accumulation and unscaling, before the optimizer.

        Args:
            models: modules, parameters, or iterables of either; one norm is taken over all of them, and the
                statistics are updated once. Under any sharding, call it on all ranks.
            optimizer: the optimizer, or several, that will step next; also as Accelerate or Lightning wrap it.
                Into a fused one (`AdamW(fused=True)`) clipping is folded: its gradients stay as they are until it
                steps. It is left out of this, and gets gradients scaled in place, if it holds parameters that are
                not among the models'. Strategies with a coefficient for each tensor always scale in place, but can
                tell the optimizer not to step.
            loss: 0-dim, for strategies that look at it; must be the same on every rank.
            process_group: ranks that hold other parameters of the same model (pipeline stages): the norm is
                taken over all of them, and all decide alike.

        Returns:
            The norm before clipping, a 0-dim float32 tensor on the gradients' device.

        Raises:
            ValueError: no parameter has a gradient, or two strategies fold into one optimizer's step.
            TypeError: something is not of its kind, or a gradient is sparse or complex.
            FloatingPointError: see `on_nonfinite` and `max_consecutive_nonfinite`.
        """
        self._check_initialised()
        for fold in self._pending:
            fold.release(self)
        self._pending = []
        given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer or ()
        optimizers = list(dict.fromkeys(map(innermost, given)))
        shards = parameters_of(models)
        gradients = [local_gradient(shard.parameter) for shard in shards]
        idle = all(gradient is None for gradient in gradients)
        if not shards or (idle and process_group is None and not any(shard.groups for shard in shards)):
            raise ValueError(NO_GRADIENTS)
        norms = tensor_norms(shards, gradients)
        norm = global_norm(norms, process_group)
        if idle and norm.device.type == "cpu" and norm == 0:
            raise ValueError(NO_GRADIENTS)
        told = claim(optimizers, shards, owner=self)
        clipping, finite = self._observe(Measured(norm, norms, loss, shards, gradients, process_group), models)
        assert clipping.skip is not None
        blank = ~finite if self.on_nonfinite == "zero" else None
        self._pending = carry_out(clipping.coefficients, clipping.skip, blank, told, shards, gradients)
        return norm.to(torch.float32)

    @torch.no_grad()
    def observe(self, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        """Take one norm into the statistics without gradients, and return by what such gradients would be scaled.

        Strategies that look at each tensor see a single one.

        Args:
            norm: 0-dim tensor; NaN or infinity leaves the statistics as they were.
            loss: 0-dim tensor, for strategies that look at it.

        Returns:
            0-dim tensor; 0 where the step would be skipped.
        """
        self._check_initialised()
        norm = norm.detach().to(torch.float32 if norm.device.type == "mps" else torch.float64)
        clipping, _ = self._observe(Measured(norm, norm.reshape(1), loss))
        assert isinstance(clipping.coefficients, Tensor) and clipping.skip is not None
        return torch.where(clipping.skip, 0.0, clipping.coefficients.reshape(()))

    def _observe(self, measured: Measured, models: Parameters = ()) -> tuple[Clipping, Tensor]:
        """Decide one step, update statistics, counters and telemetry.

        Returns:
            The decision, whose `skip` is never `None`, and whether the norm was finite, 0-dim bool.
        """
        norm = measured.norm
        self._check_policy()
        finite = torch.isfinite(norm)
        if self.on_nonfinite == "raise" and not finite:
            names = names_of(self._named or ()) | names_of(models)
            raise FloatingPointError(fault(norm, measured.norms, measured.shards, names))
        self._prepare_state(measured)
        safe = measured._replace(norm=torch.where(finite, norm, 1.0), norms=torch.where(finite, measured.norms, 1.0))
        clipping = self.clip(safe, self.state)
        if not clipping.state.keys() <= self.state.keys():
            unknown = ", ".join(sorted(clipping.state.keys() - self.state.keys()))
            raise ValueError(
                f"{type(self).__name__}.initial_state must return all of the statistics: it lacks {unknown}"
            )
        # All of these are new tensors: what a rule returns may be what it was given, under another name.
        state = {key: torch.where(finite, new, self.state[key]) for key, new in clipping.state.items()}
        telemetry = {key: _where_finite(finite, value, norm.dtype) for key, value in clipping.telemetry.items()}
        skip = ~finite if clipping.skip is None else ~finite | clipping.skip
        counted = self.counters
        clips = torch.where(clipping.clipped | skip, counted["consecutive_clips"] + 1, 0)
        counts = {
            "consecutive_clips": torch.where(finite, clips, counted["consecutive_clips"]),
            "nonfinite": counted["nonfinite"] + ~finite,
            "consecutive_nonfinite": torch.where(finite, 0, counted["consecutive_nonfinite"] + 1),
        }
        for old, new in ((self.state, state), (counted, counts)):
            for key, value in new.items():
                old[key].copy_(value)
        self.telemetry = {
            "grad_norm": norm,
            "clipped_norm": torch.where(skip, 0.0, clipping.clipped_norm),
            "clipped": clipping.clipped | skip,
            "clipped_by_max": torch.zeros_like(finite),
            **counts,
            **telemetry,
        }
        self._watch.look(counts["consecutive_nonfinite"], self.max_consecutive_nonfinite)
        return clipping._replace(skip=skip), finite

    def _check_initialised(self) -> None:
        if "_pending" not in self.__dict__:
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__()")

    def _check_policy(self) -> None:
        limit = self.max_consecutive_nonfinite
        require(self.on_nonfinite in POLICIES, "on_nonfinite", self.on_nonfinite, "one of " + ", ".join(POLICIES))
        allowed = "an integer from 1, or null for no limit"
        require(limit is None or is_count(limit), "max_consecutive_nonfinite", limit, allowed)

    def _prepare_state(self, measured: Measured) -> None:
        like = torch.zeros_like(measured.norms if self.per_tensor else measured.norm)
        if not self.counters:
            self._initialise(like)
        elif self.counters["nonfinite"].device != like.device:
            self.counters = {key: value.to(like.device) for key, value in self.counters.items()}
            self.state = {
                key: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
                for key, value in self.state.items()
            }
        if self.per_tensor:
            held = {value.shape for value in self.state.values() if value.ndim} - {like.shape}
            if held:
                raise ValueError(
                    f"{type(self).__name__} has statistics of {held.pop()[0]} tensors, but step() was given "
                    f"{like.numel()}: use one strategy for one set of parameters, always whole"
                )

    def _initialise(self, like: Tensor) -> None:
        self.config()  # finds out now, not when the state is saved, if an argument is not kept
        state = self.initial_state(like)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(self).__name__}.initial_state must return tensors: {key} is {value!r}")
        self.state = {key: value.clone() for key, value in state.items()}
        zero = torch.zeros((), dtype=torch.int64, device=like.device)
        self.counters = {key: zero.clone() for key in COUNTERS}

    def prepare(self, *models: Parameters) -> None:
        """Make the statistics for these parameters, as the first `step` on them would.

        `torch.distributed.checkpoint` loads into tensors that are there already: call this before it loads into a
        strategy that has statistics of each tensor and has not taken a step. Statistics that are there stay.

        Raises:
            ValueError: there are no parameters that require gradients, or they have no values yet.
        """
        self._check_initialised()
        shards = parameters_of(models)
        if not shards or shards[0].parameter.is_meta:
            raise ValueError("prepare() takes the parameters to train, on their device: there are none, or on meta")
        if self.counters:
            return
        device = shards[0].parameter.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._initialise(torch.zeros(len(shards) if self.per_tensor else (), dtype=wide, device=device))

    def read_telemetry(self) -> dict[str, float]:
        """Return the last step's telemetry as floats, in one transfer from the device; empty before the first step."""
        if not self.telemetry:
            return {}
        dtype = self.telemetry["grad_norm"].dtype
        values = torch.stack([value.to(dtype) for value in self.telemetry.values()]).tolist()
        return dict(zip(self.telemetry, values, strict=True))

    def config(self) -> dict[str, Any]:
        """Return the arguments this strategy was made with, by name."""
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        kept = {name: getattr(self, name, _MISSING) for name in named}
        for name in [name for name, value in kept.items() if value is _MISSING]:
            raise TypeError(
                f"{type(self).__name__} must keep its argument {name} as an attribute of that name: "
                "a saved state records it"
            )
        return {name: _plain(value) for name, value in kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decisions depend on: name, version, arguments, statistics and counters.

        Holds tensors, numbers, strings, lists and dicts only, so `torch.save`, `torch.load(weights_only=True)` and
        `torch.distributed.checkpoint` take it. The latter loads into what is there: see `prepare`.
        """
        self._check_initialised()
        if not self.counters and not self.per_tensor:
            self._initialise(torch.zeros((), dtype=torch.float64))
        return {
            "strategy": type(self).__name__,
            "version": self.version,
            "config": self.config(),
            "state": {key: value.clone() for key, value in self.state.items()},
            "counters": {key: value.clone() for key, value in self.counters.items()},
            "started": bool(self.counters),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: the state is of another strategy, version or set of arguments, or not of a strategy at all.
        """
        missing = [key for key in ("strategy", "version", "config", "state", "counters") if key not in state_dict]
        if missing:
            raise ValueError(f"this is not the state of a clipping strategy: it lacks {', '.join(missing)}")
        saved = (state_dict["strategy"], state_dict["version"])
        if saved != (type(self).__name__, self.version):
            raise ValueError(
                f"state of {saved[0]} (version {saved[1]}) cannot be loaded into "
                f"{type(self).__name__} (version {self.version})"
            )
        ours, theirs = self.config(), state_dict["config"]
        changed = [key for key in ours.keys() | theirs.keys() if ours.get(key) != _plain(theirs.get(key))]
        if changed:
            pairs = ", ".join(f"{key}={theirs.get(key)!r}, not {ours.get(key)!r}" for key in sorted(changed))
            raise ValueError(f"the saved {saved[0]} was made with {pairs}: make this one with the same arguments")
        state, counters = dict(state_dict["state"]), dict(state_dict["counters"])
        if not counters and state_dict.get("started"):
            raise ValueError(f"the saved {saved[0]} has statistics, but none were loaded: call prepare(model) before")
        if state or counters:
            like = torch.zeros((1,) if self.per_tensor else (), dtype=torch.float64)
            expected = self.initial_state(like) | dict.fromkeys(COUNTERS, like)
            found = state | counters
            wrong = expected.keys() ^ found.keys()
            scalars = {key for key, value in expected.items() if not value.ndim}
            wrong |= {key for key, value in found.items() if key in scalars and value.ndim}
            if wrong:
                raise ValueError(
                    f"the saved {saved[0]} is damaged: its statistics differ in {', '.join(sorted(wrong))}"
                )
        self.state = {key: _wide(value.clone()) for key, value in state.items()}
        self.counters = {key: value.clone() for key, value in counters.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what belongs to this process: the optimizers' hooks and the device's events."""
        return {**self.__dict__, "_pending": [], "_watch": Watch(), "_named": None}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.config().items())
        return f"{type(self).__name__}({arguments})"


_MISSING = object()
COUNTERS = ("consecutive_clips", "nonfinite", "consecutive_nonfinite")


def _wide(value: Tensor) -> Tensor:
    """Return statistics in float64, which only MPS does not have."""
    return value.to(torch.float64) if value.is_floating_point() and value.device.type != "mps" else value


def _plain(value: Any) -> Any:
    """Return a number or sequence as every file format gives it back."""
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, float) else value


def _where_finite(finite: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value, or NaN (false, if it is a bool) where `finite` is false."""
    return finite & value if value.dtype == torch.bool else torch.where(finite, value.to(dtype), torch.nan)


NO_GRADIENTS = (
    "no parameter has a gradient: call step() after loss.backward() and before optimizer.zero_grad(), "
    "on the module that was trained, with parameters that require gradients (DeepSpeed's engine keeps gradients to "
    "itself, and cannot be clipped from outside)"
)


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object, least: int = 1) -> bool:
    """Whether `value` is an int from `least` to 2**31 - 1."""
    return type(value) is int and least <= value < 2**31


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ValueError` naming the argument, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")
