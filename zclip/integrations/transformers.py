"""Clipping strategies as a callback of Hugging Face's Trainer.

The Trainer calls `on_pre_optimizer_step` after backward, accumulation and unscaling: the gradients are those the
optimizer will see. The statistics travel in the checkpoint's `trainer_state.json`, whose floats lose no digit.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
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
    the checkpoint's statistics, or with fresh ones if it has none. With `restore_callback_states_from_checkpoint` the
    Trainer replaces this callback by one of its own making, with the checkpoint's strategy and arguments.

    Args:
        strategy: any `ClippingStrategy`; its `telemetry` holds the last step's numbers. Or, as the Trainer's
            `restore_callback_states_from_checkpoint` gives it, what `state` returned.

    Raises:
        TypeError: it is neither.
    """

    def __init__(self, strategy: ClippingStrategy | Mapping[str, Any]) -> None:
        if not isinstance(strategy, ClippingStrategy | Mapping):
            raise TypeError(f"TrainerClippingCallback takes a strategy, such as ZClip(), not {strategy!r}")
        self.strategy = _from_json(strategy) if isinstance(strategy, Mapping) else strategy

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
        place = type(self.strategy)
        return {
            "args": {
                "strategy": {"class": f"{place.__module__}:{place.__qualname__}", **_json(self.strategy.state_dict())}
            },
            "attributes": {},
        }


def _from_json(saved: Mapping[str, Any]) -> ClippingStrategy:
    strategy = resolve_name(saved["class"])(**saved["config"])
    strategy.load_state_dict(_tensors(saved))
    return strategy


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
