"""Strategies and rules over updates of one's own take a step before training, on a few numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from common.errors import ConfigError, RunError
from training.config.optim import OptimConfig
from training.config.optimizer import optimizer_class, small_optimizer
from training.config.schema import Config
from training.config.strategy import (
    clipping_strategy,
    exit_name,
    is_ours,
    refuse_exit,
    rule_class,
    strategy_class,
    update_rule,
)
from training.config.telemetry_names import ReservedNameError, check_telemetry_names
from zclip import ClippingStrategy
from zclip.state import TelemetryNameError
from zclip.updates import OptimizerRule


def check_own_rules(config: Config) -> None:
    """Raise `UserError` if a strategy or a rule cannot be made, or one of your own cannot be attached or recorded.

    One of your own takes a step of the run's optimizer, so that the names of its telemetry are known before training.
    An error of its code is left for training to raise: the few numbers may be the cause.
    """
    strategy, rule = clipping_strategy(config.clip), update_rule(config.update)
    if is_ours(config.clip.target) and is_ours(config.update.target):
        return
    strategy.scope = None
    clipping = _names_after_step("clip", config.clip.target, strategy, config.optim)
    updates = [] if rule is None else _names_after_step("update", config.update.target, rule, config.optim)
    try:
        check_telemetry_names(type(strategy).__name__, clipping, type(rule).__name__, updates)
    except ReservedNameError as error:
        section, target = ("update", config.update.target) if error.by_rule else ("clip", config.clip.target)
        raise ConfigError(f"{section}._target_", target, problem=f"is not possible: {error}") from error


def _names_after_step(
    section: str, target: str | None, rule: ClippingStrategy | OptimizerRule, optim: OptimConfig
) -> list[str]:
    """Return the names in the telemetry of a strategy or rule after a step; none if its code fails."""
    with torch.random.fork_rng(devices=[]), refuse_exit(section, target):
        optimizer, loss = small_optimizer(optim), torch.ones(())
        try:
            rule.attach(optimizer)
        except TypeError as error:
            raise ConfigError(f"{section}._target_", target, problem=f"is not possible: {error}") from error
        except Exception:
            return []
        try:
            optimizer.step(lambda: cast(float, loss))
        except TelemetryNameError as error:
            raise ConfigError(f"{section}._target_", target, problem=f"is not possible: {error}") from error
        except Exception:
            return []
    return [str(name) for name in rule.telemetry]


@contextmanager
def exits_as_errors(config: Config) -> Iterator[None]:
    """Raise `RunError` if code of a class that a `_target_` names raises `SystemExit` in the block."""
    try:
        yield
    except SystemExit as error:
        if (key := _key_of_exit(config, error)) is None:
            raise
        raise RunError(f"{key} has ended the run: its code raises {exit_name(error)}") from error


def _key_of_exit(config: Config, error: SystemExit) -> str | None:
    """Return the setting, with its value, that names the class whose method raised an error; `None`: none did."""
    classes: dict[str, type] = {f"clip._target_={config.clip.target}": strategy_class(config.clip)}
    if config.update.target is not None:
        classes[f"update._target_={config.update.target}"] = rule_class(config.update.target)
    classes[f"optim._target_={config.optim.target}"] = optimizer_class(config.optim)
    found, traceback = None, error.__traceback__
    while traceback is not None:  # the innermost frame is the last
        code, values = traceback.tb_frame.f_code, traceback.tb_frame.f_locals
        owner = values.get(code.co_varnames[0]) if code.co_argcount else None
        found = next((key for key, each in classes.items() if isinstance(owner, each)), found)
        traceback = traceback.tb_next
    return found
