"""Everything that can be wrong with a configuration, found before any work starts.

`check` raises `ConfigError` with one sentence that names the key, the value and what is allowed. The other
rooms raise `ValueError("field=value ...")` for their own settings; `section` puts the group in front.
`identity` says which settings make a run what it is: the run folder's default name carries their hash.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from models import LlamaConfig
from zclip import ClippingStrategy
from zclip.base import is_number


class ConfigError(ValueError):
    """The configuration asks for something that is not allowed; the message is one sentence for the user."""


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and low <= value <= high


def _positive(value: Any) -> bool:
    return is_number(value) and 0 < value < float("inf")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _folder_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.=,+-]+", value) is not None and value.strip(".") != ""


_POSITIVE = (_positive, "a number above 0")
_COUNT = (_count, "an integer from 1")
_FOLDER = (lambda v: isinstance(v, str) and v != "", "a folder")
_FRACTION = (_between(0, 1), "a number from 0 to 1")

#: Key -> (test of the value, what is allowed).
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _POSITIVE,
    "seed": (lambda v: type(v) is int and 0 <= v < 2**32, "an integer from 0 to 2**32 - 1"),
    "name": (
        lambda v: v is None or _folder_name(v),
        "a folder name of letters, digits and . _ = , + -, or null",
    ),
    "experiment": (
        _folder_name,
        "a folder name of letters, digits and . _ = , + -",
    ),
    "data.path": (
        lambda v: v is None or isinstance(v, str),
        "a folder of .txt files, or null for the embedded corpus",
    ),
    "paths.runs": _FOLDER,
    "paths.cache": _FOLDER,
    "data.sequence_length": _COUNT,
    "data.vocab_size": _COUNT,
    "data.test_fraction": (lambda v: is_number(v) and 0 < v < 1, "a number above 0 and below 1"),
    "optim.betas": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
        "two numbers from 0 to below 1",
    ),
    "optim.eps": _POSITIVE,
    "optim.weight_decay": (_between(0, float("inf")), "a number from 0"),
    "optim.fused": (lambda v: isinstance(v, bool), "true or false"),
    "optim.warmup_fraction": _FRACTION,
    "optim.final_lr_fraction": _FRACTION,
    "trainer.accelerator": (lambda v: v in ("cpu", "gpu"), "cpu or gpu"),
    "trainer.devices": (lambda v: v == 1 and _count(v), "1"),
    "trainer.precision": (lambda v: v in ("32-true", "bf16-mixed"), "32-true or bf16-mixed"),
    "trainer.max_steps": _COUNT,
    "trainer.global_batch_size": _COUNT,
    "trainer.micro_batch_size": _COUNT,
    "trainer.log_every": _COUNT,
    "trainer.checkpoint_every": _COUNT,
    "trainer.keep_checkpoints": _COUNT,
}

#: Settings that change what is written or shown, but not what is computed.
NOT_IDENTITY = ("name", "experiment", "paths", "logger")
NOT_IDENTITY_TRAINER = ("log_every", "checkpoint_every", "keep_checkpoints")


def check(cfg: DictConfig) -> None:
    """Raise `ConfigError` unless the configuration can be run. Writes nothing.

    What depends on the text itself (is it long enough?) is found when the tokens are prepared.
    """
    for key, (allowed, description) in RULES.items():
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if not allowed(value):
            raise ConfigError(f"{key}={value} is not allowed: it must be {description}")
    model_config(cfg)
    clipping_strategy(cfg)
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu is not possible: torch sees no GPU here; use trainer=cpu")
    if cfg.trainer.global_batch_size % cfg.trainer.micro_batch_size:
        raise ConfigError(
            f"trainer.micro_batch_size={cfg.trainer.micro_batch_size} is not allowed: it must divide "
            f"trainer.global_batch_size={cfg.trainer.global_batch_size}"
        )
    if cfg.data.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"data.vocab_size={cfg.data.vocab_size} is larger than the model's: it must be at most "
            f"model.vocab_size={cfg.model.vocab_size}"
        )
    if cfg.data.path is not None and not Path(cfg.data.path).is_dir():
        raise ConfigError(
            f"data.path={cfg.data.path} is not a folder: it must be a folder of .txt files, "
            "or null for the embedded corpus"
        )


def check_writable(cfg: DictConfig) -> None:
    """Raise `ConfigError` unless files can be made in the run folder and the cache. Leaves nothing behind."""
    for key, folder in (("paths.runs", run_path(cfg)), ("paths.cache", Path(cfg.paths.cache))):
        try:
            _try_writing(folder)
        except OSError as error:
            raise ConfigError(
                f"{key}={OmegaConf.select(cfg, key)} cannot be written ({error.strerror} at {folder}): "
                "it must be a folder in which files can be made"
            ) from error


@contextmanager
def section(name: str) -> Iterator[None]:
    """Turn a `ValueError` about `field=value` into a `ConfigError` about `name.field=value`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        message = str(error)
        prefix = f"{name}." if re.match(r"\w+=", message) else f"{name}: "
        raise ConfigError(prefix + message) from error


def settings_of(group: DictConfig) -> dict[str, Any]:
    """Return a group's settings as a plain dict, without its `name`."""
    plain = OmegaConf.to_container(group, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "name"}


def model_config(cfg: DictConfig) -> LlamaConfig:
    """Return the model's shape, or raise `ConfigError`."""
    with section("model"):
        try:
            return LlamaConfig(**settings_of(cfg.model))
        except TypeError as error:
            raise ConfigError(f"model: {error}") from error


def clipping_strategy(cfg: DictConfig) -> ClippingStrategy:
    """Make the clipping strategy of `cfg.clip`, any class that its `_target_` names, or raise `ConfigError`."""
    settings = settings_of(cfg.clip)
    with section("clip"):
        try:
            strategy = hydra.utils.instantiate(settings)
        except InstantiationException as error:
            cause = error.__cause__
            if isinstance(cause, ValueError):
                raise cause from None
            raise ConfigError(f"clip: {cause or str(error).splitlines()[0]}") from error
    if not isinstance(strategy, ClippingStrategy):
        raise ConfigError(
            f"clip._target_={settings.get('_target_')} is not allowed: it must be a subclass of zclip.ClippingStrategy"
        )
    return strategy


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings on which the run's numbers depend, as a plain nested dict."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in NOT_IDENTITY}
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in NOT_IDENTITY_TRAINER}
    return kept


def run_name(cfg: DictConfig) -> str:
    """Return the name of the run folder: `cfg.name`, or one that settings alone determine."""
    if cfg.name is not None:
        return cfg.name
    digest = hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:8]
    return f"{cfg.model.name}-{cfg.clip.name}-lr{cfg.lr:g}-seed{cfg.seed}-{digest}"


def run_path(cfg: DictConfig) -> Path:
    """Return the run folder."""
    return Path(cfg.paths.runs) / cfg.experiment / run_name(cfg)


def _try_writing(folder: Path) -> None:
    """Raise `OSError` unless a file can be made in `folder`; leave nothing behind."""
    made: list[Path] = []
    try:
        for level in reversed([folder, *folder.parents]):
            if not level.exists():
                level.mkdir()
                made.append(level)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    finally:
        for level in reversed(made):
            with suppress(OSError):  # another run has put something there meanwhile
                level.rmdir()
