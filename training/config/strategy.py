"""From the section `clip` to a clipping strategy: any class that `_target_` names."""

import importlib
import inspect
from typing import Unpack, get_args, get_origin

from common.errors import ConfigError, UserError, prefix_errors
from training.config.schema import ClipConfig
from zclip import ClippingStrategy


def clipping_strategy(clip: ClipConfig) -> ClippingStrategy:
    """Return a new strategy; raise `UserError` if its class or an argument is not possible."""
    made_by, arguments = strategy_class(clip), clip.arguments
    parameters = inspect.signature(made_by).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    known = [p.name for p in named]
    for keywords in (p.annotation for p in parameters if p.kind is p.VAR_KEYWORD):
        known += get_args(keywords)[0].__annotations__ if get_origin(keywords) is Unpack else arguments
    for name in arguments:
        if name not in known:
            problem = f"is not an argument of {made_by.__name__}: it has {', '.join(known)}"
            raise ConfigError(f"clip.{name}", arguments[name], problem=problem)
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"clip.{parameter.name} is missing: {made_by.__name__} needs it")
    with prefix_errors("clip"):
        return made_by(**arguments)


def is_ours(clip: ClipConfig) -> bool:
    """Whether the class of a strategy is in this project's library, so that a file may name it."""
    return clip.target.startswith("zclip.")


def strategy_class(clip: ClipConfig) -> type[ClippingStrategy]:
    """Return the class that `clip._target_` names; raise `ConfigError` if it cannot be imported, or is no strategy."""
    module, _, name = clip.target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        problem = f"cannot be imported ({error}): it must be module.Class"
        raise ConfigError("clip._target_", clip.target, problem=problem) from error
    if not isinstance(found, type) or not issubclass(found, ClippingStrategy):
        raise ConfigError("clip._target_", clip.target, "a subclass of zclip.ClippingStrategy")
    return found
