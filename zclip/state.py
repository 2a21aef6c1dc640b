"""Saved states of clipping strategies: their layout, and the checks before one is loaded."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zclip.decision import State

#: Counters that every strategy keeps besides its own statistics: 0-dim int64 tensors.
COUNTERS = ("consecutive_clips", "nonfinite", "consecutive_nonfinite")

_MISSING = object()


def constructor_arguments(strategy: object) -> dict[str, Any]:
    """Return the arguments that a strategy was made with, read from its attributes of the same names.

    Raises:
        TypeError: the strategy did not keep an argument as an attribute.
    """
    parameters = list(inspect.signature(type(strategy).__init__).parameters.values())[1:]
    names = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    arguments = {name: getattr(strategy, name, _MISSING) for name in names}
    for name, value in arguments.items():
        if value is _MISSING:
            raise TypeError(
                f"{type(strategy).__name__} must keep its argument {name} as an attribute of that name: "
                "a saved state records it"
            )
    return {name: _plain(value) for name, value in arguments.items()}


def pack(strategy: str, version: int, config: Mapping[str, Any], state: State, counters: State) -> dict[str, Any]:
    """Return the saved state of a strategy, with copies of its statistics and counters.

    Args:
        strategy: name of its class.
        version: version of the layout of `state`.
        config: its arguments, from `constructor_arguments`.
        state: statistics of its rule.
        counters: the tensors named by `COUNTERS`; empty before the first step.
    """
    return {
        "strategy": strategy,
        "version": version,
        "config": dict(config),
        "state": {key: value.clone() for key, value in state.items()},
        "counters": {key: value.clone() for key, value in counters.items()},
        "started": bool(counters),
    }


def unpack(
    saved: Mapping[str, Any],
    strategy: str,
    version: int,
    config: Mapping[str, Any],
    initial_state: Callable[[], State],
) -> tuple[State, State]:
    """Return copies of the statistics, in float64, and of the counters of a saved state.

    Args:
        saved: from `pack`.
        strategy, version, config: as in `pack`, of the strategy that loads the state.
        initial_state: returns statistics with the expected keys; 0-dim ones must be 0-dim in the saved state too.

    Raises:
        ValueError: the state is not from a strategy, is from another strategy, version or set of arguments, or is
            damaged.
    """
    missing = [key for key in ("strategy", "version", "config", "state", "counters") if key not in saved]
    if missing:
        raise ValueError(f"this is not the state of a clipping strategy: it lacks {', '.join(missing)}")
    name = saved["strategy"]
    if (name, saved["version"]) != (strategy, version):
        raise ValueError(
            f"state of {name} (version {saved['version']}) cannot be loaded into {strategy} (version {version})"
        )
    saved_config = saved["config"]
    changed = [key for key in config.keys() | saved_config.keys() if config.get(key) != _plain(saved_config.get(key))]
    if changed:
        pairs = ", ".join(f"{key}={saved_config.get(key)!r}, not {config.get(key)!r}" for key in sorted(changed))
        raise ValueError(f"the saved {name} was made with {pairs}: make this one with the same arguments")
    state, counters = dict(saved["state"]), dict(saved["counters"])
    if not counters and saved.get("started"):
        raise ValueError(f"the saved {name} has statistics, but none were loaded: call prepare(model) before")
    if state or counters:
        wrong = _mismatches(state | counters, initial_state() | dict.fromkeys(COUNTERS, torch.zeros(())))
        if wrong:
            raise ValueError(f"the saved {name} is damaged: its statistics differ in {', '.join(sorted(wrong))}")
    return (
        {key: _to_float64(value.clone()) for key, value in state.items()},
        {key: value.clone() for key, value in counters.items()},
    )


def _mismatches(saved: State, expected: State) -> set[str]:
    """Return the keys that only one state has, and those of tensors that should be 0-dim."""
    scalars = {key for key, value in expected.items() if not value.ndim}
    return (expected.keys() ^ saved.keys()) | {key for key, value in saved.items() if key in scalars and value.ndim}


def _to_float64(value: Tensor) -> Tensor:
    """Return a floating-point tensor in float64, which MPS does not have; leave others as they are."""
    return value.to(torch.float64) if value.is_floating_point() and value.device.type != "mps" else value


def _plain(value: Any) -> Any:
    """Return a number or sequence as file formats restore it: float subclasses as float, tuples as lists."""
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, float) else value
