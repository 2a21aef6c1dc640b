"""Strategies and rules over updates of one's own take a step before training, on a few numbers."""

from typing import Any, cast

import torch

from common.errors import ConfigError
from training.config.optim import OptimConfig
from training.config.optimizer import small_optimizer
from training.config.schema import Config
from training.config.strategy import clipping_strategy, is_ours, update_rule
from zclip import ClippingStrategy
from zclip.state import TelemetryNameError
from zclip.updates import OptimizerRule


def check_own_rules(config: Config) -> None:
    """Raise `UserError` if a strategy or a rule cannot be made, or one of your own cannot be attached or recorded.

    One of your own takes a step of the run's optimizer, so that the names of its telemetry are known before training.
    An error of its code is left for training to raise: the few numbers may be the cause.
    """
    strategy, rule = clipping_strategy(config.clip), update_rule(config.update)
    if not is_ours(config.clip.target):
        strategy.scope = None
        _take_step("clip", config.clip.target, strategy, config.optim)
    if rule is not None and not is_ours(config.update.target):
        _take_step("update", config.update.target, rule, config.optim)


def _take_step(section: str, target: str | None, rule: ClippingStrategy | OptimizerRule, optim: OptimConfig) -> None:
    with torch.random.fork_rng(devices=[]):
        optimizer, loss = small_optimizer(optim), cast(Any, torch.ones(()))
        try:
            rule.attach(optimizer)
        except TypeError as error:
            raise ConfigError(f"{section}._target_", target, problem=f"is not possible: {error}") from error
        except Exception:
            return
        try:
            optimizer.step(lambda: loss)
        except TelemetryNameError as error:
            raise ConfigError(f"{section}._target_", target, problem=f"is not possible: {error}") from error
        except Exception:
            return
