"""Checks of a saved state, before anything of it is used: it may be damaged, or written by somebody else."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

#: Counters are below this, so that they can be counted up and are exact in float64.
MAX_COUNT = 2**53

#: What a strategy records of a change of an argument; a saved state has the three values of each.
CHANGE = ("setting", "from", "to")

#: Most changes of arguments that a strategy records; also most values and characters of one argument in a change.
MAX_CHANGES = 1000


def shown(value: object) -> str:
    """Return a value of any kind and size in at most 80 characters."""
    if isinstance(value, Tensor):
        if value.ndim or value.is_meta or value.layout != torch.strided:
            return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
        value = value.item()
    elif not isinstance(value, bool | int | float | str | list | tuple | dict | None):
        return f"a {type(value).__name__}"
    try:
        text = repr(value[:80] if isinstance(value, str | list) else value)
    except (RecursionError, ValueError):  # nested deeply; an int of more than 4,300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


class LengthError(ValueError):
    """A saved statistic has another length than this strategy's arguments give it."""


def refuse(strategy: str, entry: str, value: object, allowed: str, error: type[ValueError] = ValueError) -> NoReturn:
    """Raise a `ValueError` that names an entry of a saved state, its value and what is allowed."""
    raise error(f"the saved {strategy} is damaged: {entry}={shown(value)} is not allowed: it must be {allowed}")


def check_history(strategy: str, history: Tensor, count: int) -> None:
    """Raise `ValueError` unless a ring of norms has as many as were counted, at most its length, and `inf` behind."""
    norms = min(count, len(history))
    if not history[:norms].isfinite().all() or history[norms:].isfinite().any():
        refuse(strategy, "state.history", history, f"finite in its first {norms} values, and inf behind")


def check_keys(strategy: str, where: str, found: object, required: Collection[str], optional: Collection[str]) -> None:
    """Raise `ValueError` unless `found` is a dict with the required keys, and no others than the optional ones."""
    if not isinstance(found, Mapping):
        refuse(strategy, where, found, "a dict")
    missing = [key for key in required if key not in found]
    if missing:
        raise ValueError(f"the saved {strategy} is damaged: {where} lacks {', '.join(missing)}")
    unknown = [key for key in found if key not in (*required, *optional)]
    if unknown:
        allowed = ", ".join((*required, *optional)) or "nothing"
        raise ValueError(f"the saved {strategy} is damaged: {where} has {shown(unknown[0])}: it may have {allowed}")


def same(own: Any, saved: Any) -> bool:
    """Whether a saved argument is the strategy's own. Only the latter is trusted to be of a sensible size."""
    if isinstance(own, list | tuple):
        equal_length = isinstance(saved, list | tuple) and len(own) == len(saved)
        return equal_length and all(same(a, b) for a, b in zip(own, saved, strict=True))
    return not isinstance(saved, Tensor) and bool(own == saved)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return `setting`, `from` and `to` of each argument that is not the same. Only `after` is trusted."""
    changed = [key for key in sorted(before.keys() | after.keys()) if not same(after.get(key), before.get(key))]
    return [{"setting": key, "from": before.get(key), "to": after.get(key)} for key in changed]


def recordable(changes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return changes of arguments as `checked_changes` allows them: a dict, say, becomes a short text."""
    return [{k: value if _is_recordable(value) else shown(value) for k, value in c.items()} for c in changes]


def checked_changes(strategy: str, changes: Any) -> list[dict[str, Any]]:
    """Return recorded changes of arguments; raise `ValueError` if they are of another shape, or too many."""
    if not isinstance(changes, list) or len(changes) > MAX_CHANGES:
        refuse(strategy, "changes", changes, f"a list of at most {MAX_CHANGES}")
    for i, change in enumerate(changes):
        if not isinstance(change, list) or len(change) != len(CHANGE):
            refuse(strategy, f"changes[{i}]", change, f"a list of {', '.join(CHANGE)}")
        for key, value in zip(CHANGE, change, strict=True):
            if not _is_recordable(value):
                refuse(strategy, f"changes[{i}].{key}", value, "a number, a text, null, or a list of them")
    return [dict(zip(CHANGE, change, strict=True)) for change in changes]


def _is_recordable(value: Any) -> bool:
    values = value if isinstance(value, list) and len(value) <= MAX_CHANGES else [value]
    return all(map(_is_small, values))


def _is_small(value: Any) -> bool:
    """Whether a value of an argument is a number, a text or `None`, and takes little memory."""
    if isinstance(value, str):
        return len(value) <= MAX_CHANGES
    return value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63)


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor with its own memory for each element.

    A few bytes of a file can claim to be a tensor of any size, whose elements are all the same one.
    """
    if type(value) is not Tensor or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def check_tensor(strategy: str, entry: str, value: object, like: Tensor, resizable: bool) -> Tensor:
    """Return a saved tensor if it has the kind, dtype and shape of `like`.

    Floating-point statistics are float64 or float32, whatever `like` is: see `statistics_dtype`. A resizable one may
    have another length, but not other dimensions.
    """
    floating = like.is_floating_point()
    dtypes = (torch.float64, torch.float32) if floating else (like.dtype,)
    shape = f"({', '.join(['any length'] * like.ndim)})" if resizable else f"{list(like.shape)}"
    kind = "float64 or float32" if floating else str(like.dtype).removeprefix("torch.")
    allowed = f"a dense {kind} tensor of shape {shape}"
    if not is_plain(value):
        refuse(strategy, entry, value, allowed)
    if value.dtype not in dtypes or value.ndim != like.ndim:
        refuse(strategy, entry, value, allowed)
    if not resizable and value.shape != like.shape:
        refuse(strategy, entry, value, allowed, LengthError)
    return value.detach()


def check_values(strategy: str, entry: str, value: Tensor, initial: Tensor, nonnegative: bool) -> None:
    """Raise `ValueError` unless all values are finite and, if `nonnegative`, not below 0.

    NaN and infinities are allowed where `initial` has them: they are statistics that have no value yet. Integers are
    counts, at most `MAX_COUNT`. Truth values are both allowed.
    """
    if value.dtype == torch.bool:
        return
    start = initial[~initial.isfinite()].to(value).unique()
    ok = value.isfinite()
    if nonnegative:
        ok &= value >= 0
    if not value.is_floating_point():
        ok &= value <= MAX_COUNT
    ok |= torch.isin(value, start) | (value.isnan() & start.isnan().any())
    if ok.all():
        return
    index = (~ok).nonzero()[0].tolist()
    kind = "a finite number" if value.is_floating_point() else "an integer"
    below = f" to {MAX_COUNT}" if not value.is_floating_point() else ""
    range_words = f" from 0{below}" if nonnegative else ""
    start_words = "".join(f" or {number}" for number in start.tolist())
    refuse(strategy, f"{entry}{index or ''}", value[tuple(index)], f"{kind}{range_words}{start_words}")
