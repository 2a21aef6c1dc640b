"""Which settings make a run what it is: the default name of its folder carries their hash."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from training.config.schema import ClipConfig, Config
from training.config.strategy import strategy_class

#: Sections and keys that change what is written or shown, but not what is computed.
OUTPUT_KEYS = (
    "name",
    "experiment",
    "resume",
    "paths",
    "logger",
    "plan",
    "hardware",
    "print_run_dir",
    "eval",
    "paper",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_last",
    "trainer.keep_every",
    "trainer.async_save",
    "trainer.val_every",
    "trainer.val_tokens",
    "trainer.eval_every",
    "trainer.nodes",
    "trainer.devices",
)


def changes_result(key: str) -> bool:
    """Whether a setting, by its dotted key, can change the result of a run."""
    return not any(f"{key}.".startswith(f"{output}.") for output in OUTPUT_KEYS)


def identity(config: Config) -> dict[str, Any]:
    """Return the settings on which the run's numbers depend, as a plain nested dict that JSON holds."""
    plain = config.model_dump(mode="json", by_alias=True)
    kept = {key: value for key, value in plain.items() if changes_result(key)}
    trainer = config.trainer
    kept["trainer"] = {key: value for key, value in plain["trainer"].items() if changes_result(f"trainer.{key}")}
    if trainer.on_nonfinite == "rewind":  # it restarts from the last checkpoint
        kept["trainer"]["checkpoint_every"] = trainer.checkpoint_every
    kept["clip"] |= _as_declared(config.clip)
    return kept


def _as_declared(clip: ClipConfig) -> dict[str, Any]:
    """Return the strategy's arguments, with an integer as a float where its class declares one: 2 is 2.0."""
    try:
        parameters = inspect.signature(strategy_class(clip)).parameters
    except ConfigError:  # the class of another run, which cannot be imported here
        return clip.arguments
    floats = {name for name, parameter in parameters.items() if "float" in str(parameter.annotation)}
    return {
        name: float(value) if name in floats and type(value) is int else value for name, value in clip.arguments.items()
    }


def run_name(config: Config) -> str:
    """Return the name of the run folder: `name`, or one that the settings alone determine."""
    if config.name is not None:
        return config.name
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.model.name}-{config.clip.name}-lr{config.lr:g}-seed{config.seed}-{digest}"


def run_path(config: Config) -> Path:
    """Return the run folder."""
    return Path(config.paths.runs) / config.experiment / run_name(config)
