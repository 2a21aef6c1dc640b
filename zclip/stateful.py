"""Arguments, statistics and counters of a rule: what a saved state has, and how it is restored."""

import copy
import inspect
import weakref
from abc import ABCMeta
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zclip.arguments import ArgumentError, array_in, plain, plain_nested
from zclip.decision import State
from zclip.norm import statistics_dtype
from zclip.saved_state import (
    CHANGE,
    MAX_CHANGES,
    LengthError,
    check_keys,
    check_tensor,
    check_values,
    checked_changes,
    differences,
    recordable,
    refuse,
    shown,
)
from zclip.scope import patterns_of
from zclip.tensors import TensorId, checked_tensor_ids

#: Counters that every strategy keeps besides its own statistics: 0-dim int64 tensors.
COUNTERS = ("consecutive_clips", "nonfinite", "consecutive_nonfinite")
#: Entries of every saved state.
REQUIRED = ("strategy", "version", "config", "state", "counters")


class _Made(ABCMeta):
    """Class of classes that know of each object whether its `__init__` has returned. Subclasses can be abstract."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made._is_made = True
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The arguments of `__init__`, which `inspect` would not look for behind `__call__`."""
        made: Any = cls
        signature = inspect.signature(made.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])  # all but self


class Stateful(metaclass=_Made):
    """What a saved state has of a rule, and how it is restored. Base of `zclip.state.Statistics`.

    Assigning an argument, as in `strategy.z_thresh = 3.0`, calls `change`, once `__init__` has returned. So does one of
    a base class: if this class does not take it, `change` raises.
    """

    #: Version of the layout of the saved statistics.
    version = 1
    #: Whether the rule has statistics for each tensor: `initial_state` then gets (n,) zeros.
    per_tensor = False
    #: Statistics that are never below 0: a saved state with such a value is refused.
    nonnegative: Collection[str] = ()
    #: Statistics whose length changes; all others keep the shape of `initial_state`.
    resizable: Collection[str] = ()
    #: Arguments that states of earlier versions do not have, with the values that such states are taken to have.
    added: Mapping[str, Any] = MappingProxyType({})
    #: Statistics that states of earlier versions do not have: they begin as in `initial_state`.
    added_statistics: Collection[str] = ()
    #: Checks of attributes besides the arguments, under any values of which a saved state can be loaded.
    _policies: Mapping[str, Callable[[Any], Any]] = MappingProxyType({})
    _scope: str | tuple[str, ...] | None = None
    #: Patterns of the scope of the last step, and the recorded change to one that no step has used yet.
    _unused_scope: tuple[list[str] | None, dict[str, Any] | None] | None = None
    _is_made = False  # whether `__init__` has returned

    def __init__(self) -> None:
        self.state: State = {}
        self.counters: State = {}
        self.changes: list[dict[str, Any]] = []  # `setting`, `from` and `to` of each change of an argument
        self.tensors: list[TensorId] = []  # that the statistics are of, if `per_tensor`
        self._objects: list[weakref.ref[Tensor]] = []  # the same tensors, if they are of this process

    def __setattr__(self, name: str, value: Any) -> None:
        is_policy = name in self._policies
        if is_policy:
            value = self._policies[name](value)
        is_argument = self._is_made and name in _known_arguments(type(self))
        if is_argument and not isinstance(getattr(type(self), name, None), property):  # a property checks itself
            self.change(**{name: value})
            return
        if is_policy and self.__dict__.get("counters"):  # it runs
            self._record_changes({name: getattr(self, name)}, {name: value})
        super().__setattr__(name, value)

    def initial_state(self, like: Tensor) -> State:
        """Return the statistics before the first step.

        A saved state must have the same keys, dtypes and shapes, and finite values. NaN or infinity may only stand in a
        statistic that has it here, and means that there is no value yet.

        Args:
            like: zeros of the device and dtype of the statistics; 0-dim, or (n,) if `per_tensor`.
        """
        return {}

    def adapt_state(self, state: State, config: Mapping[str, Any]) -> State:
        """Return statistics that were made with other arguments as those of this strategy's. Default: as they are.

        Args:
            state: statistics with the keys, dtypes and shapes of `initial_state`; must not be changed in place.
            config: the arguments that they were made with, but for those that a subclass takes as `**policy`; those of
                a saved state may be of any kind.

        Raises:
            ValueError: an argument that is needed is not one.
        """
        return state

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` if statistics contradict each other; each is checked on its own before. Default: nothing.

        Args:
            state: statistics with the keys, dtypes and shapes of `initial_state`.
            counters: those of every strategy.
        """

    def _check_initialised(self) -> None:
        if "counters" not in self.__dict__:
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__()")

    @torch.inference_mode(False)  # later steps may be outside of it, where they could not change what it has made
    @torch.no_grad()
    def _initialise(self, like: Tensor) -> None:
        self.config()  # raises if an argument is not an attribute, before training rather than at the first save
        state = self.initial_state(like)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(self).__name__}.initial_state must return tensors: {key} is {value!r}")
        self.state = {key: value.clone() for key, value in state.items()}
        self.counters = {key: torch.zeros((), dtype=torch.int64, device=like.device) for key in COUNTERS}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self._shown().items())
        return f"{type(self).__name__}({arguments})"

    def _shown(self) -> dict[str, Any]:
        """Return what `repr` shows."""
        return self.config()

    def config(self) -> dict[str, Any]:
        """Return the arguments this strategy was made with, by name.

        Raises:
            TypeError: an argument is not an attribute, or is an array or a tensor.
        """
        names = _argument_names(type(self))
        for name in names:
            if not hasattr(self, name):
                raise TypeError(
                    f"{type(self).__name__} must keep its argument {name} as an attribute of that name: "
                    "a saved state records it"
                )
        config = {name: plain_nested(getattr(self, name)) for name in names}
        for name, value in config.items():
            if kind := array_in(value):
                raise TypeError(
                    f"{type(self).__name__} must keep its argument {name} as a number or a list, not as {kind}: "
                    "a saved state records it"
                )
        return config

    def change(self, **settings: Any) -> None:
        """Change arguments between two steps: `strategy.change(z_thresh=3.0)`. An assignment does the same.

        The statistics stay. A saved state records the new arguments, and in `changes` the last 1,000 changes. What
        `__init__` computes from its arguments is not computed again: a subclass should read them where it uses them.
        `on_nonfinite` and the other policies can be assigned.

        Args:
            settings: new values by the names of arguments.

        Raises:
            TypeError: there is no such argument.
            ArgumentError: a value is out of its range. Nothing is changed.
            ValueError: the statistics do not fit, such as those of a window of another length. Nothing is changed.
        """
        config = self.config()
        if unknown := sorted(settings.keys() - config.keys()):
            names = ", ".join(config) or "none"
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}: it has {names}")
        made = type(self)(**{**config, **settings})
        new = {name: getattr(made, name) for name in settings}
        changed = copy.copy(self)
        changed.__dict__.update(new)
        if self.counters:
            state, *_ = changed._checked(self.state_dict(), override=True)
            for key, value in state.items():
                self.state[key].copy_(value)
        after = {name: value for name, value in changed.config().items() if name in settings}
        self._record_changes({name: config[name] for name in settings}, after)
        for name, value in new.items():
            super().__setattr__(name, value)

    def _record_changes(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        self.changes = [*self.changes, *recordable(differences(before, after))][-MAX_CHANGES:]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decisions depend on: name, version, arguments, statistics and counters.

        So are `scope`, the `policy` and `changes`, each of which is a list of `setting`, `from` and `to`. It holds only
        tensors, numbers, strings, lists and dicts. `torch.save`, `torch.load(weights_only=True)` and
        `torch.distributed.checkpoint` support it. The last one loads into existing tensors: see `prepare`.
        """
        self._check_initialised()
        if not self.counters and not self.per_tensor:
            self._initialise(torch.zeros((), dtype=torch.float64, device="cpu"))
        state = {
            "strategy": type(self).__name__,
            "version": self.version,
            "config": self.config(),
            "state": {key: value.clone() for key, value in self.state.items()},
            "counters": {key: value.clone() for key, value in self.counters.items()},
            "started": bool(self.counters),
            "scope": self._patterns(),
            "changes": [[change[key] for key in CHANGE] for change in self.changes],
        }
        if self._policies:
            state["policy"] = self._policy()
        if self.per_tensor:
            state["names"] = [tensor.name for tensor in self.tensors]
            state["shapes"] = [tensor.shape for tensor in self.tensors]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], override: bool = False) -> None:
        """Restore a state that `state_dict` returned. A state that is refused changes nothing.

        The strategy keeps its own policies, such as `on_nonfinite`, and records the difference in `changes`.

        Args:
            state_dict: the state.
            override: whether the state may be of other arguments, or another scope. The strategy keeps its own, and
                records the difference in `changes`. Default False.

        Raises:
            ValueError: the state is not from a strategy, is from another strategy, version or set of arguments, or is
                damaged, or its statistics do not fit other arguments, such as those of a window of another length: the
                message names the entry, its value and what is allowed.
        """
        self.state, self.counters, self.tensors, self.changes = self._checked(state_dict, override)
        self._objects = []
        self._unused_scope = None

    def _checked(
        self, state_dict: Mapping[str, Any], override: bool
    ) -> tuple[State, State, list[TensorId], list[dict[str, Any]]]:
        """Return copies of what is in a saved state; `load_state_dict` says what it raises."""
        changes, new = self._checked_arguments(state_dict, override)
        try:
            state, counters, tensors = self._checked_statistics(state_dict, adapted=bool(new))
            if any(change["setting"] == "scope" for change in new):
                self._check_named(tensors)
            return state, counters, tensors, changes
        except ValueError as error:
            if not new:
                raise
            words = ", ".join(f"{_argument(c['setting'], c['to'])} (was {shown(c['from'])})" for c in new[:20])
            reason = str(error).removeprefix(f"the saved {type(self).__name__} is damaged: ")
            if isinstance(error, LengthError):
                reason = "the length of a history cannot change once norms were seen"
            raise ValueError(f"the statistics do not fit {words}: {reason}") from error

    def _checked_arguments(
        self, state_dict: Mapping[str, Any], override: bool
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the changes of arguments up to this strategy's, and the last ones of these, from a saved state's."""
        own = type(self).__name__
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"this is not the state of a clipping strategy: it is {shown(state_dict)}")
        missing = [key for key in REQUIRED if key not in state_dict]
        if missing:
            raise ValueError(f"this is not the state of a clipping strategy: it lacks {', '.join(missing)}")
        name, version = state_dict["strategy"], state_dict["version"]
        if not (isinstance(name, str) and isinstance(version, int) and (name, version) == (own, self.version)):
            name = name[:80] if isinstance(name, str) else shown(name)
            raise ValueError(
                f"state of {name} (version {shown(version)}) cannot be loaded into {own} (version {self.version})"
            )
        of_policy = ("policy",) if self._policies else ()
        of_tensors = ("names", "shapes") if self.per_tensor else ()
        optional = ("started", "changes", "scope", *of_policy, *of_tensors)
        check_keys(own, "it", state_dict, REQUIRED, optional)
        saved = state_dict["config"]
        config = self.config()
        required = [name for name in config if name not in self.added]
        check_keys(own, "config", saved, required, [name for name in config if name in self.added])
        before = {**self.added, **saved, "scope": state_dict.get("scope")}
        new = differences(before, {**config, "scope": self._patterns()})
        if new and not override:
            pairs = [f"{_argument(c['setting'], c['from'])}, not {shown(c['to'])}" for c in new[:20]]
            same_or = "make this one with the same arguments, or load it with override=True"
            raise ValueError(f"the saved {own} was made with {', '.join(pairs)}: {same_or}")
        recorded, policy = checked_changes(own, state_dict.get("changes", [])), self._policy()
        saved_policy = self._checked_policy(state_dict.get("policy", {}))
        others = differences({name: saved_policy.get(name, value) for name, value in policy.items()}, policy)
        return [*recorded, *recordable([*new, *others])][-MAX_CHANGES:], new

    def _policy(self) -> dict[str, Any]:
        """Return the policies, but for those that are arguments of this class."""
        names = self._policies.keys() - _argument_names(type(self))
        return {name: plain(getattr(self, name)) for name in sorted(names)}

    def _checked_policy(self, saved: Any) -> Mapping[str, Any]:
        own = type(self).__name__
        check_keys(own, "policy", saved, (), self._policies)
        for name, value in saved.items():
            try:
                self._policies[name](value)
            except ArgumentError as error:
                entry = f"policy.{name}={shown(value)}"
                raise ValueError(f"the saved {own} is damaged: {entry} {error.problem}") from None
        return saved

    @torch.inference_mode(False)
    def _checked_statistics(self, state_dict: Mapping[str, Any], adapted: bool) -> tuple[State, State, list[TensorId]]:
        """Return copies of the statistics in a saved state, `adapted` from other arguments to this strategy's."""
        own = type(self).__name__
        started = state_dict.get("started", False)
        if not isinstance(started, bool):
            refuse(own, "started", started, "true or false")
        state, counters = state_dict["state"], state_dict["counters"]
        if started and isinstance(counters, Mapping) and not counters:
            raise ValueError(f"the saved {own} has statistics, but none were loaded: call prepare(model) before")
        if isinstance(counters, Mapping) and not counters:
            check_keys(own, "state", state, (), ())
            return {}, {}, []
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        counters = self._checked_tensors("counters", counters, dict.fromkeys(COUNTERS, zero), COUNTERS)
        tensors = checked_tensor_ids(own, state_dict) if self.per_tensor else []
        like = torch.zeros((len(tensors),) if self.per_tensor else (), dtype=torch.float64, device="cpu")
        state = self._checked_tensors("state", state, self.initial_state(like), self.nonnegative)
        if adapted:
            state = self.adapt_state(state, state_dict["config"])
        self.check_state(state, counters)
        return state, counters, tensors

    @staticmethod
    def _check_named(tensors: Sequence[TensorId]) -> None:
        """Raise `ValueError` if statistics of tensors cannot find theirs in another scope: a position is no name."""
        if not all(isinstance(tensor.name, str) for tensor in tensors):
            raise ValueError("the parameters have no names, by which statistics find theirs in another scope")

    def _patterns(self) -> list[str] | None:
        """Return the patterns of the scope."""
        return None if self._scope is None else patterns_of(self._scope)

    def _checked_tensors(self, where: str, saved: Any, initial: State, nonnegative: Collection[str]) -> State:
        own = type(self).__name__
        if isinstance(saved, Mapping):
            saved = {key: initial[key] for key in self.added_statistics if key in initial} | dict(saved)
        check_keys(own, where, saved, initial.keys(), ())
        tensors = {}
        for key, like in initial.items():
            entry = f"{where}.{key}"
            tensors[key] = check_tensor(own, entry, saved[key], like, key in self.resizable)
            check_values(own, entry, tensors[key], like, key in nonnegative)
        return {key: _wide(value).clone() for key, value in tensors.items()}


@lru_cache
def _argument_names(rule: type[Stateful]) -> tuple[str, ...]:
    """Return the names of the arguments of a class, in order."""
    parameters = inspect.signature(rule).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


@lru_cache
def _known_arguments(rule: type[Stateful]) -> frozenset[str]:
    """Return the names of the arguments of a class and of its base classes."""
    classes = [each for each in rule.__mro__ if issubclass(each, Stateful)]
    return frozenset(name for each in classes for name in _argument_names(each))


def _argument(name: str, value: object) -> str:
    """Return an argument of a saved state and its value, in as few characters as an error may have."""
    return f"{shown(name)[1:-1]}={shown(value)}"


def _wide(value: Tensor) -> Tensor:
    """Return a floating-point tensor in the dtype of statistics; leave others as they are."""
    return value.to(statistics_dtype(value.device)) if value.is_floating_point() else value
