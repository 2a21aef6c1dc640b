"""Which settings make a run what it is: the default name of its folder carries their hash."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.text import flatten
from data.config import InstanceFilterConfig
from training.config.optimizer import optimizer_class
from training.config.schema import Config, UpdateConfig
from training.config.strategy import is_ours, rule_class, strategy_class
from zclip.arguments import is_number

#: Sections, and keys outside of them, that change what is written or shown, but not what is computed.
OUTPUT = {"name", "experiment", "resume", "paths", "logger", "plan", "hardware", "print_run_dir", "eval", "paper"}
#: Keys of the section `trainer` that do not change it either; the first are about checkpoints.
CHECKPOINTS = {"checkpoint_every", "keep_last", "keep_every", "async_save"}
TRAINER_OUTPUT = CHECKPOINTS | {"log_every", "val_every", "val_tokens", "eval_every", "nodes", "devices"}

#: Settings added after runs had names, by dotted key, with their defaults: with the default, a run is named as before.
ADDED: dict[str, Any] = {
    "fork_data": "same",
    "fork_statistics": "same",
    "update.recovery_window": 500,
    "update": UpdateConfig(_target_=None).model_dump(mode="json", by_alias=True),
    "model.embedding_initializer_range": None,
    "optim.amsgrad": False,
    "data.corruption.random_steps": 0,
    "data.corruption.random_first_step": 1,
    "data.corruption.burst_length": 1,
    "data.instance_filter": InstanceFilterConfig().model_dump(mode="json"),
}


def is_place(key: str) -> bool:
    """Whether a setting says where a text or tokenizer is. A run knows them by their content, wherever they are."""
    return re.fullmatch(r"data\.(path|tokenizer|sources\.[^.]+\.path)", key) is not None


def changes_result(key: str) -> bool:
    """Whether a setting, by its dotted key, can change the result of a run."""
    section, _, name = key.partition(".")
    return section not in OUTPUT and (section != "trainer" or name not in TRAINER_OUTPUT)


def identity(config: Config, is_named: bool = True) -> dict[str, Any]:
    """Return the settings on which the run's numbers depend, as a plain nested dict that JSON holds.

    `is_named`: the user named the classes of the strategy and the rule. Those of a file are imported only if `zclip`'s.
    """
    dropped: dict[str, Any] = {**dict.fromkeys(OUTPUT, True), "trainer": TRAINER_OUTPUT}
    kept = config.model_dump(mode="json", by_alias=True, exclude=dropped)
    if config.trainer.on_nonfinite == "rewind":  # it restarts from the last checkpoint
        kept["trainer"]["checkpoint_every"] = config.trainer.checkpoint_every
    clip, update, optim = config.clip, config.update, config.optim
    if is_named or is_ours(clip.target):
        kept["clip"] |= _as_declared(lambda: strategy_class(clip), clip.arguments)
    if (target := update.target) is not None and (is_named or is_ours(target)):
        kept["update"] |= _as_declared(lambda: rule_class(target), update.arguments)
    if optim.target is not None and (is_named or is_ours(optim.target)):
        own = {key: optim.arguments[key] for key in optim.model_extra or {}}
        kept["optim"] |= _as_declared(lambda: optimizer_class(optim), own)
    # A class of one's own may have other defaults.
    is_own = {"optim": optim.target is not None, "update": not is_ours(update.target)}
    for key, default in ADDED.items():
        *sections, name = key.split(".")
        if any(is_own.get(section) for section in sections):
            continue
        section = reduce(getitem, sections, kept)
        if name in section and section[name] == default:  # an optimizer lacks the settings of others
            del section[name]
    return kept


def saved_identity_of(saved: Config, config: Config, is_named: bool = True) -> dict[str, Any]:
    """Return the identity of a configuration from a file, to be compared with that of `config`.

    Classes that the file names are imported only if they are `zclip`'s, or those of `config`, which the user has named
    (`is_named`).
    """
    theirs, ours = ((c.clip.target, c.update.target, c.optim.target) for c in (saved, config))
    return identity(saved, is_named=is_named and theirs == ours)


def shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings, by dotted key, that are the same in all processes of a run.

    They change what a process computes, or when it exchanges numbers with others. Places may differ between machines.
    """
    plain = config.model_dump(mode="json", by_alias=True, exclude=OUTPUT - {"eval"})
    return {key: value for key, value in flatten(plain).items() if not (is_place(key) or key == "eval.data_dir")}


def differences(config: Config, saved: Config, is_named: bool = True) -> dict[str, tuple[Any, Any]]:
    """Return the values in both of each key, dotted and sorted, in which two identities differ; `None`: it has none.

    Settings that an identity leaves out because they were added later have their defaults.

    `saved` is from a file, and so is `config` unless `is_named`, see `identity`. Places do not differ between files.
    """
    identities = identity(config, is_named), saved_identity_of(saved, config, is_named)
    ours, theirs = (flatten(ADDED) | flatten(each) for each in identities)
    pairs = {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and (is_named or not is_place(key))}


def _as_declared(find_class: Callable[[], type], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a class, with an integer as a float where the class declares one: 2 is 2.0."""
    try:
        parameters = inspect.signature(find_class()).parameters
    except ConfigError:  # the class of another run, which cannot be imported here
        return arguments
    floats = {name for name, parameter in parameters.items() if "float" in str(parameter.annotation)}
    integers = {name for name in floats if type(arguments.get(name)) is int and is_number(arguments[name])}
    return {name: float(value) if name in integers else value for name, value in arguments.items()}


def run_name(config: Config) -> str:
    """Return the name of the run folder: `name`, or one that the settings alone determine."""
    if config.name is not None:
        return config.name
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    rule = "" if config.update.target is None else f"-{config.update.name}"
    optimizer = "" if config.optim.name == "adamw" else f"-{config.optim.name}"
    return f"{config.model.name}-{config.clip.name}{rule}{optimizer}-lr{config.lr:g}-seed{config.seed}-{digest}"


def run_path(config: Config) -> Path:
    """Return the run folder."""
    return Path(config.paths.runs) / config.experiment / run_name(config)
