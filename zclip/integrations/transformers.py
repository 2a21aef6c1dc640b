"""Clipping strategies as a callback of Hugging Face's Trainer.

The Trainer calls `on_pre_optimizer_step` after backward, accumulation and unscaling, so the gradients are those of the
optimizer's step. The statistics are saved in the checkpoint's `trainer_state.json`, whose floats are exact.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from zclip import ClippingStrategy
from zclip.saved_state import shown

#: Dtypes of statistics, by their names in a checkpoint.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.int64, torch.bool)}


class TrainerClippingCallback(TrainerCallback, ExportableState):
    """Run a clipping strategy before every optimizer step of Hugging Face's Trainer.

        Trainer(..., args=TrainingArguments(..., max_grad_norm=0.0), callbacks=[TrainerClippingCallback(ZClip())])

    A run that resumes from a checkpoint restores the checkpoint's statistics, or starts new ones if it has none. Limits
    of the Trainer's interface:

    - The Trainer still computes the norm that it logs, in an extra pass over the gradients.
    - It does not pass the loss to callbacks: `SkipStep` uses the norm only.
    - Its norm writes NaN to every gradient if any holds one: `on_nonfinite="raise"` names all parameters.

    Args:
        strategy: any `ClippingStrategy`; its `telemetry` holds the values of the last step.
        override: whether the statistics in a checkpoint may be of other arguments, see
            `ClippingStrategy.load_state_dict`. Default False.

    Raises:
        TypeError: `strategy` is not a `ClippingStrategy`.
        ValueError: the Trainer replaces this callback by a new one, by `restore_callback_states_from_checkpoint`.
    """

    def __init__(self, strategy: ClippingStrategy, override: bool = False) -> None:
        if isinstance(strategy, Mapping):  # the Trainer passes the arguments that `state` saved
            raise ValueError(
                "restore_callback_states_from_checkpoint=True is not allowed: leave it out, the statistics are "
                "restored without it, into the strategy that you made"
            )
        if not isinstance(strategy, ClippingStrategy):
            raise TypeError(f"TrainerClippingCallback takes a strategy, such as ZClip(), not {strategy!r}")
        self.strategy = strategy
        self.override = override

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the statistics of the checkpoint that the run resumes from.

        Raises:
            ValueError: the Trainer clips too, uses DeepSpeed, or has two of these callbacks; or the checkpoint is from
                another strategy, or of other arguments without `override`.
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
            try:
                state = saved[name]["args"]["strategy"]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{name} in trainer_state.json has no strategy: it is damaged") from error
            self.strategy.load_state_dict(_tensors(state), self.override)
        else:
            saved[name] = self.state()  # the Trainer updates existing entries only

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip the gradients; a fused optimizer applies the coefficient inside its step."""
        self.strategy.step(kwargs["model"], optimizer=kwargs["optimizer"])

    def state(self) -> dict[str, Any]:
        """Return the strategy's name, arguments and statistics as JSON values."""
        return {"args": {"strategy": _json(self.strategy.state_dict())}, "attributes": {}}


def _json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    return {key: _json(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _tensors(state: Any) -> Any:
    """Return a saved state with the tensors that `_json` wrote; `load_state_dict` checks all else."""
    if not isinstance(state, Mapping):
        return state
    restored = dict(state)
    for part in ("state", "counters"):
        if isinstance(state.get(part), Mapping):
            restored[part] = {key: _tensor(f"{part}.{shown(key)[1:-1]}", value) for key, value in state[part].items()}
    return restored


def _tensor(entry: str, value: Any) -> torch.Tensor:
    allowed = 'a dtype and its values, such as {"dtype": "float64", "values": [0.5]}'
    if (
        not isinstance(value, Mapping)
        or value.keys() != {"dtype", "values"}
        or not isinstance(value["dtype"], str)
        or value["dtype"] not in DTYPES
    ):
        raise ValueError(f"{entry}={shown(value)} is not allowed: it must be {allowed}")
    try:
        return torch.tensor(value["values"], dtype=DTYPES[value["dtype"]], device="cpu")
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:  # no numbers, of several lengths, too large
        raise ValueError(f"{entry}={shown(value['values'])} is not allowed: it must be {allowed}") from error
