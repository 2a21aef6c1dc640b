"""What happens around each optimizer step: the one place where Lightning calls the parts of a run, in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from data import Batch
from evaluation.response_cache import EvaluationInterrupted
from training.checkpoint.manager import CheckpointManager
from training.checkpoint.restore import load_checkpoint
from training.lightning_internals import dump_checkpoint, forward_context, reopen_epoch, rescale_batch_counts
from training.module import PretrainingModule
from training.monitor.health import NonFiniteGuard
from training.monitor.history import History
from training.monitor.metrics import MetricsRecorder
from training.monitor.step_timer import StepTimer
from training.runtime.coordinated_stop import CoordinatedStop
from training.validation.loss import LossValidator
from training.validation.tasks import TaskEvaluator
from zclip import ClippingStrategy
from zclip.integrations.lightning import ClippingCallback
from zclip.updates import OptimizerRule


@dataclass(eq=False)
class RunCallback(pl.Callback):
    """Calls the parts of a run, which know neither Lightning nor each other.

    After each optimizer step: record the metrics, agree on stopping, save if due, guard against non-finite steps,
    validate if due. `TimedClippingCallback` clips before the optimizer's step.
    """

    metrics: MetricsRecorder
    guard: NonFiniteGuard
    stop: CoordinatedStop
    checkpoints: CheckpointManager
    loss_validator: LossValidator
    task_evaluator: TaskEvaluator

    def __post_init__(self) -> None:
        self.timer = StepTimer(torch.device("cpu"))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let Lightning load checkpoints by our readers, which execute nothing of them."""
        trainer.strategy.load_checkpoint = partial(load_checkpoint, trainer)  # type: ignore[method-assign]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the state that Lightning does not save, and convert its counters to this run's micro-batches."""
        self.metrics.history = History(checkpoint.get("metrics"))
        self.checkpoints.load_extra_state(checkpoint)
        rescale_batch_counts(checkpoint, trainer.accumulate_grad_batches)
        reopen_epoch(checkpoint, trainer.max_steps)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state that Lightning does not save."""
        checkpoint.update(self.checkpoints.extra_state(), metrics=self.metrics.history.state())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start every part at the step that the run resumes from, and do the evaluations that are due there."""
        step = trainer.global_step
        self.guard.restore(self._start_metrics(trainer, pl_module))
        self.timer.restart(pl_module.device)
        self.stop.start(trainer.world_size)
        self.checkpoints.start(step, trainer.strategy.root_device)
        self.loss_validator.start(step)
        self.task_evaluator.start(step)
        if step > 0:
            self._validate_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that the batch has arrived."""
        self.timer.record("data")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the parts after a step, and only add the loss after one of its earlier micro-batches."""
        self.metrics.add_micro_batch(outputs["cross_entropy"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            self.timer.record("forward_backward")
            return
        self._record(trainer, pl_module, batch)
        if self.stop.poll():
            trainer.should_stop = True
        self._save_if_due(trainer)
        if self.guard.limit_reached:
            trainer.should_stop = True
        if not trainer.should_stop:  # otherwise the evaluations are done when the run resumes
            self._validate_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete what is pending. If the last checkpoint could not be saved, that is a `RunError`."""
        self._flush()
        self.stop.finish()
        self.checkpoints.finish()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete metrics.jsonl, of which the results are computed. If it cannot be written, that is a `RunError`."""
        self.metrics.finish()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the evaluations after the last step, if the run was killed before they were done."""
        if not self.metrics.started:  # there was no step to train
            self._start_metrics(trainer, pl_module)
            self.loss_validator.start(trainer.global_step)
        self._validate_if_due(trainer, pl_module)

    def _start_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> Sequence[float | None]:
        reduce = trainer.strategy.reduce
        return self.metrics.start(trainer.global_step, module.device, lambda tensor, how: reduce(tensor, reduce_op=how))

    def _record(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> None:
        assert isinstance(module, PretrainingModule)
        step = trainer.global_step
        self.timer.record("optimizer")
        self.metrics.record(step, module.lr_at(step - 1), self.timer.pop(), batch.masked_rows)
        if self.metrics.is_due(step):
            self._flush()

    def _flush(self) -> None:
        """Write the recorded steps, and judge the run by their losses."""
        losses = self.metrics.flush()
        for step, loss in losses:
            self.guard.add(step, loss)
        if losses:
            self.timer.record("flush")

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if self.checkpoints.is_due(step, stopping=trainer.should_stop):
            self._flush()
            self.checkpoints.save(step, partial(dump_checkpoint, trainer))
            self.timer.record("saving")

    def _validate_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do the evaluations of this step. If a signal interrupts them, save the step and stop."""
        assert isinstance(module, PretrainingModule)
        step = trainer.global_step
        loss_due, tasks_due = self.loss_validator.is_due(step), self.task_evaluator.is_due(step)
        if not (loss_due or tasks_due):
            return
        self._flush()  # first, so that the steps before are on the disk and on the screen
        try:
            with torch.no_grad(), forward_context(trainer):
                if loss_due:
                    self.loss_validator.validate(step, module.evaluate)
                if tasks_due:
                    self.task_evaluator.evaluate(step, module.model, module.device)
        except EvaluationInterrupted:
            trainer.should_stop = True
            self._save_if_due(trainer)
        module.reshard()
        self.timer.record("evaluation")


class TimedClippingCallback(ClippingCallback):
    """Clips the gradients, and measures how long that takes.

    If all `rows` of a global batch are masked, there is nothing to learn from: the gradients are dropped, and neither
    the strategy nor the optimizer takes the step.

    With `reset_state`, the statistics in a checkpoint are not restored: they belong to another strategy. With
    `override`, they may be of the strategy with other arguments.
    """

    def __init__(
        self, strategy: ClippingStrategy, timer: StepTimer, rows: int, reset_state: bool, override: bool
    ) -> None:
        super().__init__(strategy, override)
        self.timer = timer
        self.rows = rows
        self.all_masked = False
        self.reset_state = reset_state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics, unless they are to be reset."""
        if not self.reset_state:
            super().load_state_dict(state_dict)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Note whether all rows of the global batch are masked."""
        self.all_masked = batch.masked_rows == self.rows

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the gradients, or drop them."""
        self.timer.record("forward_backward")
        if self.all_masked:
            self._drop_gradients(pl_module)
        else:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.timer.record("clip")

    def _drop_gradients(self, module: pl.LightningModule) -> None:
        """Let the step change nothing. Its norm is recorded as 0, and the counters as they were."""
        module.zero_grad()
        self._had_backward, self._loss = False, None
        zero = torch.zeros((), device=module.device)
        norms = dict.fromkeys(("grad_norm", "clipped_norm", "clipped", "clipped_by_max"), zero)
        self.strategy.telemetry = {**norms, **{key: value.clone() for key, value in self.strategy.counters.items()}}


class UpdateRuleCallback(pl.Callback):
    """Attaches a rule over updates to the optimizer. Its statistics are saved in the checkpoint.

    With `reset_state`, the statistics in a checkpoint are not restored: they belong to another rule. With
    `override`, they may be of the rule with other arguments.
    """

    def __init__(self, rule: OptimizerRule, reset_state: bool, override: bool) -> None:
        self.rule = rule
        self.reset_state = reset_state
        self.override = override

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the rule."""
        (optimizer,) = trainer.optimizers
        self.rule.attach(optimizer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach the rule."""
        self.rule.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rule."""
        return {"rule": self.rule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics, unless they are to be reset."""
        if not self.reset_state:
            self.rule.load_state_dict(state_dict["rule"], self.override)
