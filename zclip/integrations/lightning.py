"""Clipping strategies as Lightning callbacks.

Lightning calls `on_before_optimizer_step` after backward, accumulation and unscaling: the gradients are those
the optimizer will see. Leave the Trainer's `gradient_clip_val` unset. The statistics travel in the checkpoint.
"""

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from zclip.base import ClippingStrategy
from zclip.strategies.zclip import ZClip


class ClippingCallback(pl.Callback):
    """Run a clipping strategy before every optimizer step.

    The norm is that of the optimizer's parameters. Under automatic optimization strategies that look at the loss get
    its mean over the global batch, except in fp16, where Lightning has scaled it. With several optimizers each has
    statistics of its own: the strategy given is that of the first, copies of it are made for the others.

    Args:
        strategy: any `ClippingStrategy`; its `telemetry` holds the last step's numbers, also as
            `callback.strategy.telemetry`, with several optimizers `callback.strategies[i].telemetry`.

    Raises:
        TypeError: it is none.
    """

    def __init__(self, strategy: ClippingStrategy) -> None:
        if not isinstance(strategy, ClippingStrategy):
            raise TypeError(f"ClippingCallback takes a strategy, such as ZClip(), not {strategy!r}")
        self.strategies = [strategy]
        self._fresh = copy.deepcopy(strategy)
        self._loss: Tensor | None = None
        self._backward = False

    @property
    def strategy(self) -> ClippingStrategy:
        """The strategy of the first optimizer."""
        return self.strategies[0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a Trainer that clips as well, and make a strategy for each optimizer.

        Raises:
            ValueError: `gradient_clip_val` is set, the strategy is DeepSpeed's, or there are two of these callbacks.
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
        self._provide(len(trainer.optimizers))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add up the losses of the micro-batches, which Lightning has divided by their number."""
        self._backward = True
        if not pl_module.automatic_optimization:
            return  # whose loss it is cannot be told
        if self.strategy.uses_loss and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the gradients, as part of the optimizer's step if that is fused."""
        backward, self._backward = self._backward, False
        theirs = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if pl_module.automatic_optimization and not backward:
            return  # training_step returned None: there is nothing to clip
        idle = trainer.world_size == 1 and all(parameter.grad is None for parameter in theirs)
        if not theirs or (idle and not pl_module.automatic_optimization):
            return  # no optimizer at all, or one whose turn it is not
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers, whose step is still to come
        loss, self._loss = self._loss, None
        if loss is not None:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
        index = next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)
        whole = trainer.strategy.model or pl_module
        fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in whole.modules())
        models: Any = whole if fsdp1 else theirs  # FSDP1's parameters do not tell who shares them
        strategy = self.strategies[index]
        strategy._named = pl_module
        strategy.step(models, optimizer=optimizer, loss=loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all strategies."""
        return {"strategies": [strategy.state_dict() for strategy in self.strategies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of all strategies."""
        states = state_dict["strategies"]
        self._provide(len(states))
        for strategy, state in zip(self.strategies, states, strict=True):
            strategy.load_state_dict(state)

    def _provide(self, count: int) -> None:
        while len(self.strategies) < count:
            self.strategies.append(copy.deepcopy(self._fresh))


class ZClipLightningCallback(ClippingCallback):
    """`ZClip` as a Lightning callback: takes the arguments of `zclip.ZClip`, with the same defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(ZClip(*args, **kwargs))

    @property
    def zclip(self) -> ClippingStrategy:
        """The strategy, under the name the published callback gives it."""
        return self.strategy
