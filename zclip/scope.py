"""The parameters that a strategy measures and clips, where these are not all."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from zclip.arguments import require
from zclip.norm import Shard

#: Names of parameters that an error shows.
SHOWN = 3


def check_scope(scope: object) -> None:
    """Raise `ArgumentError` unless `scope` is a pattern, a list or tuple of patterns, or `None`."""
    patterns = [scope] if isinstance(scope, str) else scope
    valid = isinstance(patterns, list | tuple) and all(isinstance(p, str) and p for p in patterns) and len(patterns) > 0
    require(valid, "scope", scope, "a pattern of parameter names, or a list of patterns", null="for all parameters")


def patterns_of(scope: str | Sequence[str]) -> list[str]:
    """Return the patterns of a scope, of which a single one may stand alone."""
    return [scope] if isinstance(scope, str) else [*scope]


def in_scope(name: str, scope: str | Sequence[str]) -> bool:
    """Return whether a parameter's name matches one of the patterns, and none of those that begin with `!`.

    Patterns are those of a shell, case-sensitive, and `*` matches dots too. If all begin with `!`, every other name is
    in the scope.
    """
    return _matches(name, tuple(patterns_of(scope)))


@lru_cache(maxsize=1 << 16)
def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    is_included = not included or any(fnmatchcase(name, pattern) for pattern in included)
    return is_included and not any(fnmatchcase(name, pattern) for pattern in excluded)


def split_by_scope(
    shards: Sequence[Shard], names: Mapping[int, str], scope: str | Sequence[str]
) -> tuple[list[Shard], list[Shard]]:
    """Return the parameters in the scope, and the others.

    Args:
        shards: all parameters.
        names: their names, by their ids.
        scope: see `in_scope`.

    Raises:
        ValueError: the scope is not one, a parameter has no name, or none is in the scope.
    """
    check_scope(scope)
    if not all(id(shard.parameter) in names for shard in shards):
        raise ValueError("scope= needs the names of the parameters: give step() or attach() the module that holds them")
    inside = [shard for shard in shards if in_scope(names[id(shard.parameter)], scope)]
    if not inside:
        some = ", ".join(names[id(shard.parameter)] for shard in shards[:SHOWN])
        raise ValueError(f"scope={scope} has none of the {len(shards)} parameters, which are {some}, ...")
    chosen = {id(shard.parameter) for shard in inside}
    return inside, [shard for shard in shards if id(shard.parameter) not in chosen]
