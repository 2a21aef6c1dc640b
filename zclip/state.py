"""The statistics of clipping strategies: made for parameters, moved to their device, saved and restored."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from zclip.decision import State
from zclip.norm import Parameters, parameters_of, statistics_dtype
from zclip.saved_state import check_keys, check_tensor, check_values, is_plain, refuse, same, shown

#: Counters that every strategy keeps besides its own statistics: 0-dim int64 tensors.
COUNTERS = ("consecutive_clips", "nonfinite", "consecutive_nonfinite")
#: Entries of every saved state.
REQUIRED = ("strategy", "version", "config", "state", "counters")


class Statistics:
    """Statistics of a rule, and counters. Base of `ClippingStrategy`."""

    #: Version of the layout of the saved statistics.
    version = 1
    #: Whether the rule has statistics for each tensor: `initial_state` then gets (n,) zeros.
    per_tensor = False
    #: Statistics that are never below 0: a saved state with such a value is refused.
    nonnegative: Collection[str] = ()
    #: Statistics whose length changes; all others keep the shape of `initial_state`.
    resizable: Collection[str] = ()

    def __init__(self) -> None:
        self.state: State = {}
        self.counters: State = {}

    def initial_state(self, like: Tensor) -> State:
        """Return the statistics before the first step.

        A saved state must have the same keys, dtypes and shapes, and finite values. NaN or infinity may only stand in a
        statistic that has it here, and means that there is no value yet.

        Args:
            like: zeros of the device and dtype of the statistics; 0-dim, or (n,) if `per_tensor`.
        """
        return {}

    def prepare(self, *models: Parameters) -> None:
        """Create the statistics for these parameters, as the first `step` on them would; keep existing statistics.

        `torch.distributed.checkpoint` loads into existing tensors. Call this before it loads into a strategy that has
        statistics for each tensor and has not taken a step.

        Args:
            models: modules, parameters, or iterables of either, as for `step`.

        Raises:
            ValueError: no parameter requires gradients, or the parameters are on the meta device.
        """
        self._check_initialised()
        shards = parameters_of(models)
        if not shards or shards[0].parameter.is_meta:
            raise ValueError("prepare() takes the parameters to train, on their device: there are none, or on meta")
        if not self.counters:
            device = shards[0].parameter.device
            shape = (len(shards),) if self.per_tensor else ()
            self._initialise(torch.zeros(shape, dtype=statistics_dtype(device), device=device))

    def _check_initialised(self) -> None:
        if "counters" not in self.__dict__:
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__()")

    def _initialise(self, like: Tensor) -> None:
        self.config()  # raises if an argument is not an attribute, before training rather than at the first save
        state = self.initial_state(like)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(self).__name__}.initial_state must return tensors: {key} is {value!r}")
        self.state = {key: value.clone() for key, value in state.items()}
        self.counters = {key: torch.zeros((), dtype=torch.int64, device=like.device) for key in COUNTERS}

    def _prepare_state(self, like: Tensor) -> None:
        """Create the statistics before the first step, or move restored ones to the device of `like`."""
        if not self.counters:
            self._initialise(torch.zeros_like(like))
        elif self.counters["nonfinite"].device != like.device:
            self.counters = {key: value.to(like.device) for key, value in self.counters.items()}
            self.state = {
                key: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
                for key, value in self.state.items()
            }
        if self.per_tensor:
            other_shapes = {value.shape for value in self.state.values() if value.ndim} - {like.shape}
            if other_shapes:
                raise ValueError(
                    f"{type(self).__name__} has statistics of {other_shapes.pop()[0]} tensors, but step() was given "
                    f"{like.numel()}: use one strategy for one fixed set of parameters"
                )

    def config(self) -> dict[str, Any]:
        """Return the arguments this strategy was made with, by name."""
        parameters = [*inspect.signature(type(self).__init__).parameters.values()][1:]  # all but self
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for name in names:
            if not hasattr(self, name):
                raise TypeError(
                    f"{type(self).__name__} must keep its argument {name} as an attribute of that name: "
                    "a saved state records it"
                )
        return {name: _plain(getattr(self, name)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decisions depend on: name, version, arguments, statistics and counters.

        It holds only tensors, numbers, strings, lists and dicts. `torch.save`, `torch.load(weights_only=True)` and
        `torch.distributed.checkpoint` support it. The last one loads into existing tensors: see `prepare`.
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
        """Restore a state that `state_dict` returned. A state that is refused changes nothing.

        Raises:
            ValueError: the state is not from a strategy, is from another strategy, version or set of arguments, or is
                damaged: the message names the entry, its value and what is allowed.
        """
        self.state, self.counters = self._checked(state_dict)

    def _checked(self, state_dict: Mapping[str, Any]) -> tuple[State, State]:
        """Return copies of the statistics and counters of a saved state; `load_state_dict` says what it raises."""
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
        check_keys(own, "it", state_dict, REQUIRED, ("started",))
        started = state_dict.get("started", False)
        if not isinstance(started, bool):
            refuse(own, "started", started, "true or false")
        self._check_config(state_dict["config"])
        state, counters = state_dict["state"], state_dict["counters"]
        if started and isinstance(counters, Mapping) and not counters:
            raise ValueError(f"the saved {own} has statistics, but none were loaded: call prepare(model) before")
        if isinstance(counters, Mapping) and not counters:
            check_keys(own, "state", state, (), ())
            return {}, {}
        zero = torch.zeros((), dtype=torch.int64)
        counters = self._checked_tensors("counters", counters, dict.fromkeys(COUNTERS, zero), COUNTERS)
        count = self._saved_count(state) if self.per_tensor else None
        like = torch.zeros(() if count is None else (count,), dtype=torch.float64)
        state = self._checked_tensors("state", state, self.initial_state(like), self.nonnegative)
        self.check_state(state, counters)
        return state, counters

    def _check_config(self, saved: Any) -> None:
        """Raise `ValueError` unless saved arguments are those of this strategy."""
        own, config = type(self).__name__, self.config()
        names = [key for key in saved if isinstance(key, str)] if isinstance(saved, Mapping) else []
        check_keys(own, "config", saved, (), names)
        changed = [key for key in sorted(config.keys() | saved.keys()) if not same(config.get(key), saved.get(key))]
        if changed:
            pairs = [
                f"{key if key in config else shown(key)}={shown(saved.get(key))}, not {shown(config.get(key))}"
                for key in changed[:20]
            ]
            raise ValueError(f"the saved {own} was made with {', '.join(pairs)}: make this one with the same arguments")

    def _saved_count(self, state: Any) -> int:
        """Return the number of tensors that saved statistics are of."""
        values = state.values() if isinstance(state, Mapping) else ()
        return next((len(value) for value in values if is_plain(value) and value.ndim == 1), 1)

    def _checked_tensors(self, where: str, saved: Any, initial: State, nonnegative: Collection[str]) -> State:
        own = type(self).__name__
        check_keys(own, where, saved, initial.keys(), ())
        tensors = {}
        for key, like in initial.items():
            entry = f"{where}.{key}"
            tensors[key] = check_tensor(own, entry, saved[key], like, key in self.resizable)
            check_values(own, entry, tensors[key], like, key in nonnegative)
        return {key: _wide(value).clone() for key, value in tensors.items()}

    def check_state(self, state: State, counters: State) -> None:
        """Raise `ValueError` if statistics contradict each other; each is checked on its own before. Default: nothing.

        Args:
            state: statistics with the keys, dtypes and shapes of `initial_state`.
            counters: those of every strategy.
        """


def _wide(value: Tensor) -> Tensor:
    """Return a floating-point tensor in the dtype of statistics; leave others as they are."""
    return value.to(statistics_dtype(value.device)) if value.is_floating_point() else value


def _plain(value: Any) -> Any:
    """Return a number or sequence as file formats restore it: float subclasses as float, tuples as lists."""
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, float) else value
