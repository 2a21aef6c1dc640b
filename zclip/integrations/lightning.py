"""Clipping strategies as Lightning callbacks.

Lightning calls `on_before_optimizer_step` after backward, accumulation and unscaling, so the gradients are those of the
optimizer's step. Leave the Trainer's `gradient_clip_val` unset. The statistics are saved in the checkpoint.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from zclip import ClippingStrategy, ZClip
from zclip.apply import optimizer_parameters
from zclip.norm import Shard
from zclip.scope import group_names, split_by_scope
from zclip.tensors import parameter_names


class ClippingCallback(pl.Callback):
    """Run a clipping strategy before every optimizer step.

    The norm is taken over the optimizer's parameters; under FSDP1, which flattens them, over the whole module.
    Strategies that use the loss get its mean over the global batch under automatic optimization, except in fp16, where
    Lightning has scaled it. Each of several optimizers has its own statistics: the first one uses `strategy`, the
    others use copies of it. Of several optimizers, those without a parameter in the `scope` are not clipped, as Muon
    under `scope="group:AdamW"`.

    Args:
        strategy: any `ClippingStrategy`. Its telemetry is `callback.strategy.telemetry`, and with several optimizers
            `callback.strategies[i].telemetry`.
        override: whether the statistics in a checkpoint may be of other arguments, see
            `ClippingStrategy.load_state_dict`. Default False.

    Raises:
        TypeError: `strategy` is not a `ClippingStrategy`.
    """

    def __init__(self, strategy: ClippingStrategy, override: bool = False) -> None:
        if not isinstance(strategy, ClippingStrategy):
            raise TypeError(f"ClippingCallback takes a strategy, such as ZClip(), not {strategy!r}")
        self.strategies = [strategy]
        self.override = override
        self._initial_strategy = copy.deepcopy(strategy)
        self._loss: Tensor | None = None
        self._had_backward = False

    @property
    def strategy(self) -> ClippingStrategy:
        """The strategy of the first optimizer."""
        return self.strategies[0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reject a Trainer that clips too, and create a strategy for each optimizer.

        Raises:
            ValueError: `gradient_clip_val` is set, the Trainer uses DeepSpeed, or it has two of these callbacks.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "strategy=deepspeed is not supported: its engine keeps gradients to itself; shard with "
                "ModelParallelStrategy (FSDP2) instead"
            )
        if sum(isinstance(callback, ClippingCallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("two clipping callbacks clip for one Trainer: give it one")
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val} is not allowed: leave it unset, "
                f"{type(self.strategy).__name__} clips the gradients"
            )
        self._create_strategies(len(trainer.optimizers))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Sum the losses of the micro-batches, which Lightning has divided by their number."""
        self._had_backward = True
        if not pl_module.automatic_optimization:
            return  # the loss may belong to any of several optimizers
        if self.strategy.uses_loss and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the gradients of an optimizer; a fused one applies the coefficient inside its step."""
        had_backward, self._had_backward = self._had_backward, False
        parameters = optimizer_parameters(optimizer)
        if pl_module.automatic_optimization and not had_backward:
            return  # training_step returned None
        no_gradients = trainer.world_size == 1 and all(parameter.grad is None for parameter in parameters)
        if not parameters or (no_gradients and not pl_module.automatic_optimization):
            return  # Lightning's placeholder for no optimizer, or an optimizer that this step does not train
        pairs = [*zip(self.strategies, trainer.optimizers, strict=False)]
        if len(pairs) > 1:
            clipped = [other for strategy, other in pairs if _has_part(other, pl_module, strategy.scope)]
            if clipped and not any(other is optimizer for other in clipped):
                return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves unscaling to a fused optimizer's step, which comes later
        loss, self._loss = self._loss, None
        if loss is not None:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
        model = trainer.strategy.model or pl_module
        fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        # The process group of FSDP1 parameters is known to their modules only.
        models: Any = model if fsdp1 else parameters
        strategy = next(strategy for strategy, other in pairs if other is optimizer)
        strategy._naming_module = pl_module
        strategy.step(models, optimizer=optimizer, loss=loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all strategies."""
        return {"strategies": [strategy.state_dict() for strategy in self.strategies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all strategies; a state that is refused changes none of them.

        Raises:
            ValueError: the state is damaged, or not one of these strategies, or of other arguments without `override`.
        """
        states = state_dict.get("strategies") if isinstance(state_dict, Mapping) else None
        if not isinstance(states, list) or not states:
            raise ValueError("this is not the state of a clipping callback: it lacks a list of strategies")
        for i, state in enumerate(states):
            strategy = self.strategies[i] if i < len(self.strategies) else self._initial_strategy
            copy.deepcopy(strategy).load_state_dict(state, self.override)
        self._create_strategies(len(states))
        for strategy, state in zip(self.strategies, states, strict=False):
            strategy.load_state_dict(state, self.override)

    def _create_strategies(self, count: int) -> None:
        while len(self.strategies) < count:
            self.strategies.append(copy.deepcopy(self._initial_strategy))


def _has_part(optimizer: torch.optim.Optimizer, module: pl.LightningModule, scope: str | Sequence[str] | None) -> bool:
    """Whether a parameter of an optimizer is in a scope."""
    if scope is None:
        return True
    shards = [Shard(parameter, ()) for parameter in optimizer_parameters(optimizer)]
    return bool(split_by_scope(shards, parameter_names(module), group_names([optimizer]), scope).inside)


class ZClipLightningCallback(ClippingCallback):
    """`ZClip` as a Lightning callback, with the arguments and defaults of `zclip.ZClip`, and `override`."""

    def __init__(self, *args: Any, override: bool = False, **kwargs: Any) -> None:
        super().__init__(ZClip(*args, **kwargs), override)

    @property
    def zclip(self) -> ClippingStrategy:
        """The strategy, under its name in the published callback."""
        return self.strategy
