"""From the sections `clip` and `update` to a clipping strategy and a rule over updates, and to any named class."""

import importlib
import inspect
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack, get_args, get_origin

from torch.optim import Optimizer

from common.errors import ConfigError, UserError, one_line, prefix_errors
from training.config.schema import ClipConfig, UpdateConfig
from zclip import ClippingStrategy
from zclip.updates import OptimizerRule, UpdateRule

#: Methods of base classes; a class must have one of them of its own. A subclass comes before its base.
_ABSTRACT: dict[type, tuple[str, ...]] = {
    ClippingStrategy: ("decide", "clip"),
    UpdateRule: ("decide", "before_step"),
    OptimizerRule: ("before_step",),
    Optimizer: ("step",),
}

T = TypeVar("T", bound=ClippingStrategy | OptimizerRule)
C = TypeVar("C", bound=ClippingStrategy | OptimizerRule | Optimizer)


def clipping_strategy(clip: ClipConfig) -> ClippingStrategy:
    """Return a new strategy, of any class; raise `UserError` if its class or an argument is not possible."""
    return _made("clip", clip.target, strategy_class(clip), clip.arguments)


def update_rule(update: UpdateConfig) -> OptimizerRule | None:
    """Return a new rule over updates, `None` without one; raise `UserError` if it or an argument is not possible."""
    if update.target is not None:
        return _made("update", update.target, rule_class(update.target), update.arguments)
    for name, value in update.arguments.items():
        raise ConfigError(f"update.{name}", value, problem="is not possible with update=none, which has no arguments")
    return None


def is_ours(target: str | None) -> bool:
    """Whether a `_target_` is in this project's library or torch's, or null, so that a file may name it."""
    return target is None or target.startswith(("zclip.", "torch.optim."))


def strategy_class(clip: ClipConfig) -> type[ClippingStrategy]:
    """Return the class that `clip._target_` names; raise `ConfigError` if it cannot be imported, or is no strategy."""
    return find_class("clip", clip.target, ClippingStrategy, "a subclass of zclip.ClippingStrategy")


def rule_class(target: str) -> type[OptimizerRule]:
    """Return the class that `update._target_` names; raise `ConfigError` if there is none, or it is no rule."""
    return find_class("update", target, OptimizerRule, "a subclass of zclip.updates.OptimizerRule")


def find_class(section: str, target: str, base: type[C], allowed: str) -> type[C]:
    """Return the subclass of `base` that `_target_` of a section names; raise `ConfigError` if there is none.

    `allowed`: what it must be, in words.
    """
    module, _, name = target.rpartition(".")
    with refuse_exit(section, target):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError, TypeError) as error:
            problem = f"cannot be imported ({error}): it must be module.Class"
            raise ConfigError(f"{section}._target_", target, problem=problem) from error
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(f"{section}._target_", target, allowed)
    abstract = next(each for each in _ABSTRACT if issubclass(found, each))
    methods = _ABSTRACT[abstract]
    if all(getattr(found, method) is getattr(abstract, method) for method in methods):
        lacking = "takes no step" if abstract is Optimizer else "decides nothing"
        problem = f"{lacking}: it must have the method {' or '.join(methods)}"
        raise ConfigError(f"{section}._target_", target, problem=problem)
    return found


def check_arguments(section: str, made_by: type[Any], arguments: dict[str, Any], supplied: Container[str] = ()) -> None:
    """Raise `UserError` unless a class takes these keyword arguments, and needs no others but those `supplied`."""
    parameters = inspect.signature(made_by).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in supplied]
    known = [p.name for p in named]
    for keywords in (p.annotation for p in parameters if p.kind is p.VAR_KEYWORD):
        known += get_args(keywords)[0].__annotations__ if get_origin(keywords) is Unpack else arguments
    for name in arguments:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            problem = f"is not an argument of {made_by.__name__}: {has}"
            raise ConfigError(f"{section}.{name}", arguments[name], problem=problem)
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"{section}.{parameter.name} is missing: {made_by.__name__} needs it")


def exit_name(error: SystemExit) -> str:
    """Return `SystemExit` with its status, or with a message of at most 100 characters."""
    return f"SystemExit({error.code if isinstance(error.code, int | None) else repr(one_line(error, 100))})"


@contextmanager
def refuse_exit(section: str, target: str | None) -> Iterator[None]:
    """Raise `ConfigError` if code of the class that `_target_` of a section names raises `SystemExit` in the block."""
    try:
        yield
    except SystemExit as error:
        problem = f"is not possible: its code raises {exit_name(error)}"
        raise ConfigError(f"{section}._target_", target, problem=problem) from error


def _made(section: str, target: str, made_by: type[T], arguments: dict[str, Any]) -> T:
    check_arguments(section, made_by, arguments)
    with refuse_exit(section, target), prefix_errors(section):
        return made_by(**arguments)
