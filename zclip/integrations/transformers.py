"""Clipping strategies as a callback of Hugging Face's Trainer.

The Trainer calls `on_pre_optimizer_step` after backward, accumulation and unscaling: the gradients are those the
optimizer will see. The statistics travel in the checkpoint's `trainer_state.json`, whose floats lose no digit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from zclip.base import ClippingStrategy


class TrainerClippingCallback(TrainerCallback, ExportableState):
    """Run a clipping strategy before every optimizer step of Hugging Face's Trainer.

        Trainer(..., args=TrainingArguments(..., max_grad_norm=0.0), callbacks=[TrainerClippingCallback(ZClip())])

    The Trainer still takes the norm that it logs, a pass over the gradients that a callback cannot spare. It does not
    tell callbacks the loss: `SkipStep` looks at the norm alone. A run that is resumed from a checkpoint goes on with
    the checkpoint's statistics, or with fresh ones if it has none. The Trainer's own norm leaves NaN in every gradient
    where there was one in any: `on_nonfinite="raise"` names them all.

    Args:
        strategy: any `ClippingStrategy`; its `telemetry` holds the last step's numbers.

    Raises:
        TypeError: it is none.
        ValueError: the Trainer makes a new callback in the place of this one.
    """

    def __init__(self, strategy: ClippingStrategy) -> None:
        if isinstance(strategy, Mapping):  # what `state` returned, given back
            raise ValueError(
                "restore_callback_states_from_checkpoint=True is not allowed: leave it out, the statistics are "
                "restored without it, into the strategy that you made"
            )
        if not isinstance(strategy, ClippingStrategy):
            raise TypeError(f"TrainerClippingCallback takes a strategy, such as ZClip(), not {strategy!r}")
        self.strategy = strategy

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the statistics of the checkpoint that is resumed from.

        Raises:
            ValueError: the Trainer clips as well, runs DeepSpeed, or has two of these callbacks; or the checkpoint is
                of another strategy or other arguments.
        """
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} is not allowed: give TrainingArguments max_grad_norm=0.0, "
                f"{type(self.strategy).__name__} clips the gradients"
            )
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed is not supported: its engine reduces, clips and steps in one call, on gradients that the "
                "parameters do not hold; shard with FSDP2 instead"
            )
        saved: Any = state.stateful_callbacks
        name = type(self).__name__
        if isinstance(saved.get(name), list):
            raise ValueError(f"two {name}s clip for one Trainer: give it one")
        if name in saved:
            self.strategy.load_state_dict(_tensors(saved[name]["args"]["strategy"]))
        else:
            saved[name] = self.state()  # the Trainer updates only entries that the checkpoint resumed from has

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip the gradients, as part of the optimizer's step if that is fused."""
        self.strategy.step(kwargs["model"], optimizer=kwargs["optimizer"])

    def state(self) -> dict[str, Any]:
        """Return the strategy, its arguments and statistics, as JSON holds them."""
        return {"args": {"strategy": _json(self.strategy.state_dict())}, "attributes": {}}


def _json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    return {key: _json(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _tensors(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"dtype", "values"}:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
    return {key: _tensors(inner) for key, inner in value.items()}
