"""Clipping strategies as Lightning callbacks.

Lightning calls `on_before_optimizer_step` after backward, accumulation and unscaling: the gradients are those
the optimizer will see. Leave the Trainer's `gradient_clip_val` unset. The statistics travel in the checkpoint.
"""

from typing import Any

import lightning.pytorch as pl
import torch

from zclip.base import ClippingStrategy
from zclip.strategies.zclip import ZClip


class ClippingCallback(pl.Callback):
    """Run a clipping strategy before every optimizer step.

    Args:
        strategy: any `ClippingStrategy`; its `telemetry` holds the last step's numbers.
    """

    def __init__(self, strategy: ClippingStrategy) -> None:
        self.strategy = strategy

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a Trainer that clips as well.

        Raises:
            ValueError: `gradient_clip_val` is set.
        """
        if trainer.gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val} is not allowed: leave it unset, "
                f"{type(self.strategy).__name__} clips the gradients"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the module's gradients, as part of the optimizer's step if that is fused."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers, whose step is still to come
        self.strategy.step(pl_module, optimizer=optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the strategy's state."""
        return self.strategy.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the strategy's state."""
        self.strategy.load_state_dict(state_dict)


class ZClipLightningCallback(ClippingCallback):
    """`ZClip` as a Lightning callback: takes the arguments of `zclip.ZClip`, with the same defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(ZClip(*args, **kwargs))

    @property
    def zclip(self) -> ClippingStrategy:
        """The strategy, under the name the published callback gives it."""
        return self.strategy
