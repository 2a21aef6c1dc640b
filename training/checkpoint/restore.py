"""How Lightning loads a checkpoint: by our readers, which execute nothing that it holds.

Lightning's own reader of a sharded checkpoint unpickles its index and the objects that are no tensors.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from common.errors import RunError, one_line
from common.root_cause import root_cause
from training.checkpoint.format import load_full, load_header, load_shards
from training.checkpoint.state import KEYS, step_of
from zclip.integrations.lightning import ClippingCallback


def load_checkpoint(trainer: pl.Trainer, path: str | Path, **_: Any) -> dict[str, Any]:
    """Return what Lightning restores, in place of its strategy's `load_checkpoint`; load shards into the model.

    Raises:
        RunError: it is not the checkpoint that was checked, or not one of this run.
    """
    checkpoint = Path(path)
    try:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            state = load_header(checkpoint)
            _check(trainer, checkpoint, state)
            _load_shards(trainer, checkpoint)
        else:
            state = load_full(checkpoint)
            _check(trainer, checkpoint, state)
    except (Exception, CheckpointException) as error:
        reason = one_line(root_cause(error)) or type(error).__name__
        raise RunError(
            f"{checkpoint} cannot be loaded ({reason}): remove it to continue from the one before"
        ) from error
    return {key: state[key] for key in KEYS if key in state}


def _check(trainer: pl.Trainer, checkpoint: Path, state: dict[str, Any]) -> None:
    """Raise an error if a checkpoint is not that of its name, or if the clipper or the rule refuses its state."""
    if step_of(checkpoint) != state["global_step"]:
        raise ValueError(f"it is of step {state['global_step']!r}, or of something else")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ClippingCallback) or callback.state_key in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][callback.state_key])  # Lightning does so again


def _load_shards(trainer: pl.Trainer, checkpoint: Path) -> None:
    """Load the shards of this process into the model and the optimizer. All processes call it."""
    module = trainer.strategy.model
    assert module is not None
    weights = {"state_dict": get_model_state_dict(module)}
    load_shards(checkpoint, weights)
    module.load_state_dict(weights["state_dict"])
    for index, optimizer in enumerate(trainer.optimizers):
        name = f"optimizer_{index}"
        states = {name: get_optimizer_state_dict(module, optimizer)}
        load_shards(checkpoint, states)
        options = StateDictOptions(cpu_offload=True)
        set_optimizer_state_dict(module, optimizer, optim_state_dict=states[name], options=options)
