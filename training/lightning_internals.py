"""Everything in this project that depends on private names or on the loop state of Lightning.

Each function says why it is needed. tests/training/test_lightning_internals.py holds what it relies on, so that an
upgrade of Lightning fails there with a sentence, and not in a run.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl

from training.runtime.signals import Interrupted


@contextmanager
def no_trainer_variables() -> Iterator[None]:
    """Hide the variables `PL_TRAINER_*`, from which Lightning takes arguments that a `Trainer` is not given.

    A limit of its time or batches, left over in a shell, would end a run early as if it were finished.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PL_TRAINER_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def keep_our_signal_handlers(trainer: pl.Trainer) -> None:
    """Make Lightning install no signal handlers.

    Its handler of SIGTERM starts a collective inside the handler, which can deadlock, and its handlers for SLURM save
    a checkpoint there. Ours set a flag, see `training.runtime.signals`.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def skip_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Make Lightning not exchange between the processes before every batch whether one has received SIGTERM.

    That would wait for the device each time. `CoordinatedStop` does it on the CPU instead.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what `Trainer.save_checkpoint` would write. All processes call it.

    `Trainer.save_checkpoint` does not write atomically, and not asynchronously: the writing is ours.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def rescale_batch_counts(checkpoint: dict[str, Any], grad_accum_steps: int) -> None:
    """Convert the batch counters in a checkpoint, in place, to micro-batches of this run.

    Lightning counts micro-batches, and resumes in the middle of a step if the new run has more or fewer of them in a
    step: with another micro-batch size, or on another number of processes. Checkpoints are saved in
    `on_train_batch_end`, where the last micro-batch is not counted as completed yet.
    """
    micro_batches = checkpoint["global_step"] * grad_accum_steps
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update({name: micro_batches - (name == "completed") for name in counts})


def reopen_epoch(checkpoint: dict[str, Any], max_steps: int) -> None:
    """Let Lightning go on in the epoch of a checkpoint, in place, if it has fewer than `max_steps` steps.

    A run is one epoch. A fork may begin after the last step of another run, where Lightning would begin a second epoch.
    Checkpoints of such forks count it, if they are from before this function.
    """
    progress = checkpoint["loops"]["fit_loop"]
    for counts in (progress["epoch_progress"]["total"], progress["epoch_progress"]["current"]):
        counts.update(ready=1, started=1, processed=0, completed=0)
    if checkpoint["global_step"] < max_steps:
        progress["epoch_loop.batch_progress"]["is_last_batch"] = False


@contextmanager
def interrupts_as_raised(trainer: pl.Trainer) -> Iterator[None]:
    """Raise `Interrupted` with the step again in place of what Lightning makes of it.

    Lightning catches `KeyboardInterrupt`, of which `Interrupted` is a kind, and exits with status 1.
    """
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, Interrupted):
            raise
        raise Interrupted(stop.__context__.signum, trainer.global_step) from stop


def forward_context(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return the context in which Lightning runs a forward pass: autocast with `bf16-mixed`.

    Hooks run outside it, but an evaluation in a hook must compute in the precision of training.
    """
    return trainer.precision_plugin.forward_context()
