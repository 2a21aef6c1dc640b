"""The parameters that a strategy measures and clips, where these are not all: by their names, or by their groups."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from zclip.apply import unwrap
from zclip.arguments import plain, require
from zclip.norm import Shard, device_of

#: What begins a pattern of groups of an optimizer's parameters, instead of names of parameters.
GROUP = "group:"
#: Names that an error shows.
SHOWN = 3

NO_NAMES = "scope= needs the names of the parameters: give step() or attach() the module that holds them"
NO_GROUPS = "scope= names groups of parameters: give step() and prepare() optimizer=, or attach() the strategy"


class Split(NamedTuple):
    """Parameters by a scope.

    Attributes:
        inside: those in the scope.
        others: all others.
        matches: number of parameters that each pattern matches, then of all in the scope, of those without a name that
            a pattern needs, and 1 if a pattern needs groups and there are none.
    """

    inside: list[Shard]
    others: list[Shard]
    matches: list[int]


def check_scope(scope: object) -> None:
    """Raise `ArgumentError` unless `scope` is a pattern, a list or tuple of patterns, or `None`."""
    patterns: Any = [scope] if isinstance(scope, str) else scope
    valid = isinstance(patterns, list | tuple) and len(patterns) > 0
    valid = valid and all(isinstance(p, str) and p.removeprefix("!").removeprefix(GROUP) for p in patterns)
    require(valid, "scope", scope, "a pattern of parameter names, or a list of patterns", null="for all parameters")


def patterns_of(scope: str | Sequence[str]) -> list[str]:
    """Return the patterns of a scope, of which a single one may stand alone."""
    return [scope] if isinstance(scope, str) else [*scope]


def plain_scope(scope: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Return a scope whose patterns are plain texts: a saved state has none of subclasses, such as an enum's."""
    return plain(scope) if scope is None or isinstance(scope, str) else tuple(map(plain, scope))


def group_names(optimizers: Collection[Any]) -> dict[int, str]:
    """Return the names of groups by the ids of their parameters: a group's `name`, or the class of its optimizer.

    A container of optimizers, such as torchtitan's, has them as its `optimizers`.
    """
    names: dict[int, str] = {}
    for optimizer in map(unwrap, optimizers):
        for inner in getattr(optimizer, "optimizers", None) or [optimizer]:
            for group in getattr(inner, "param_groups", ()):
                name = group.get("name")
                name = type(inner).__name__ if name is None else str(name)
                names |= dict.fromkeys(map(id, group["params"]), name)
    return names


def in_scope(name: str | None, scope: str | Sequence[str], group: str | None = None) -> bool:
    """Return whether a parameter matches one of the patterns, and none of those that begin with `!`.

    Patterns are those of a shell, case-sensitive, and `*` matches dots too. If all begin with `!`, every other
    parameter is in the scope. A pattern such as `group:adamw` is one of names of groups, all others of parameters.

    Args:
        name: the parameter's name; `None` matches no pattern.
        scope: a pattern, or several.
        group: the name of its group in the optimizer. Default `None`: it matches no pattern.
    """
    return _judge(tuple(patterns_of(scope)), name, group)[0]


@lru_cache(maxsize=1 << 16)
def _judge(patterns: tuple[str, ...], name: str | None, group: str | None) -> tuple[bool, tuple[bool, ...]]:
    """Return whether a parameter is in the scope, and whether each of its patterns matches, without a leading `!`."""
    excludes = [pattern.startswith("!") for pattern in patterns]
    matched = []
    for pattern in (pattern.removeprefix("!") for pattern in patterns):
        found = group if pattern.startswith(GROUP) else name
        matched.append(found is not None and fnmatchcase(found, pattern.removeprefix(GROUP)))
    included = [match for match, exclude in zip(matched, excludes, strict=True) if not exclude]
    excluded = [match for match, exclude in zip(matched, excludes, strict=True) if exclude]
    return (any(included) or not included) and not any(excluded), tuple(matched)


def split_by_scope(
    shards: Sequence[Shard], names: Mapping[int, str], groups: Mapping[int, str], scope: str | Sequence[str]
) -> Split:
    """Return the parameters in the scope, and the others.

    Args:
        shards: all parameters.
        names: their names, by their ids.
        groups: the names of their groups, by their ids.
        scope: see `in_scope`.
    """
    patterns = tuple(patterns_of(scope))
    of_groups = [pattern.removeprefix("!").startswith(GROUP) for pattern in patterns]
    inside: list[Shard] = []
    others: list[Shard] = []
    matches = [0] * len(patterns)
    unnamed = 0
    for shard in shards:
        key = id(shard.parameter)
        name, group = names.get(key), groups.get(key)
        is_inside, matched = _judge(patterns, name, group)
        (inside if is_inside else others).append(shard)
        matches = [count + match for count, match in zip(matches, matched, strict=True)]
        unnamed += name is None
    unnamed *= not all(of_groups)
    return Split(inside, others, [*matches, len(inside), unnamed, any(of_groups) and not groups])


def check_split(
    split: Split,
    scope: str | Sequence[str],
    names: Mapping[int, str],
    groups: Mapping[int, str],
    process_group: dist.ProcessGroup | None,
) -> None:
    """Raise `ValueError` if no rank has a parameter in the scope, and warn of each pattern that matches nothing.

    All ranks of the process group must call it, and raise the same error.
    """
    shards = [*split.inside, *split.others]
    matches = split.matches
    if process_group is not None:
        total = torch.tensor(matches, device=device_of(shards, process_group))
        dist.all_reduce(total, group=process_group)
        matches = total.tolist()
    *by_pattern, inside, unnamed, ungrouped = matches
    if unnamed or ungrouped:
        raise ValueError(NO_NAMES if unnamed else NO_GROUPS)
    patterns = patterns_of(scope)
    if not inside:
        known = [names[id(shard.parameter)] for shard in shards if id(shard.parameter) in names]
        some = ", ".join(known[:SHOWN])
        kinds = f"; groups are {', '.join(sorted(set(groups.values())))}" if groups else ""
        which = f"parameters, which are {some}, ..." if some else "parameters"
        raise ValueError(f"scope={_words(patterns)} has none of the {len(shards)} {which}{kinds}")
    for pattern, count in zip(patterns, by_pattern, strict=True):
        if not count:
            what = "group" if pattern.removeprefix("!").startswith(GROUP) else "parameter"
            warnings.warn(f"{pattern!r} in scope={_words(patterns)} matches no {what}", stacklevel=2)


def _words(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"[{', '.join(patterns)}]"
