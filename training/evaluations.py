"""Evaluations while a run trains: loss on held-out text, and tasks of lm-eval, each every so many steps.

They are lines of evaluations.jsonl and scores in eval.json. One that is due at the step from which a run continues, and
is not there, is done first. Training waits, and is not changed: nothing random is drawn, no gradient made.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from data import TextEncoder
from evaluation.scores import Scores, key_of, score_task
from evaluation.tasks import TaskError
from training.config import ConfigError
from training.folder import RunFolder, write_whole
from training.held_out import HeldOut, bits_per_byte
from training.metrics import Metrics
from training.module import PretrainingModule
from training.processes import of_rank_0


class Tasks(NamedTuple):
    """Tasks of lm-eval, ready to be scored.

    Attributes:
        loaded: by name and number of solved examples.
        limit, seed: see `evaluation.scores.score_task`.
        batch_tokens: see `evaluation.language_model.RunModel`.
    """

    loaded: dict[tuple[str, int], Any]
    limit: int | None
    seed: int
    batch_tokens: int | None


class Evaluations(pl.Callback):
    """Evaluate after some steps.

    Args:
        folder: run folder.
        metrics: told what the time goes to.
        held_out: to be evaluated every `test_every` steps; `None`: never.
        tasks: to be scored every `tasks_every` steps; `None`: never.
        tokenizer: of the model.
        listener: called on rank 0 with the numbers of an evaluation and its step.
        console: told the numbers.
    """

    def __init__(
        self,
        folder: RunFolder,
        metrics: Metrics,
        held_out: HeldOut,
        test_every: int | None,
        tasks: Tasks | None,
        tasks_every: int | None,
        tokenizer: TextEncoder,
        listener: Callable[[dict[str, float], int], None],
        console: Console,
    ) -> None:
        self.folder = folder
        self.metrics = metrics
        self.held_out = held_out
        self.test_every = test_every
        self.tasks = tasks
        self.tasks_every = tasks_every
        self.tokenizer = tokenizer
        self.listener = listener
        self.console = console
        self._bytes: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what was found after the step from which the run goes on; do what is due there."""
        if trainer.is_global_zero:
            kept = [row for row in self.folder.evaluations() if row["step"] <= trainer.global_step]
            if kept or self.folder.evaluated.exists():
                write_whole(self.folder.evaluated, "".join(json.dumps(row) + "\n" for row in kept))
            try:
                Scores(self.folder.scores).forget_after(trainer.global_step)
            except TaskError as error:
                raise ConfigError(str(error)) from error
        if trainer.global_step:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Do what is due after a step, unless the run is to stop: then it is done when it continues."""
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and not trainer.should_stop:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PretrainingModule)
        step = trainer.global_step
        test = self.test_every is not None and step % self.test_every == 0 and step < trainer.max_steps
        score = self.tasks_every is not None and step % self.tasks_every == 0
        if not (test or score):
            return
        self.metrics.flush(trainer, pl_module)  # so that the steps before are on the disk, and told
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            if test and step not in of_rank_0(lambda: [row["step"] for row in self.folder.evaluations()]):
                self._test(trainer, pl_module, step)
            if score and self.tasks is not None:
                with torch.compiler.set_stance("force_eager"):  # of as many shapes as there are batches
                    self._score(pl_module, self.tasks, step)
        if isinstance(pl_module.model, FSDPModule):
            pl_module.model.reshard()  # what a forward pass without a backward pass leaves gathered
        self.metrics.clock.mark("evaluation")

    def _test(self, trainer: pl.Trainer, module: PretrainingModule, step: int) -> None:
        """Find the loss on held-out text."""
        if self._bytes is None:
            self._bytes = self.held_out.bytes(self.tokenizer)
        loss = module.evaluate(self.held_out)
        row: dict[str, Any] = {"step": step, "test_tokens": self.held_out.tokens}
        if math.isfinite(loss):
            row |= {
                "test_loss": loss,
                "test_perplexity": math.exp(min(loss, 700.0)),
                "test_bits_per_byte": bits_per_byte(loss, self.held_out.tokens, self._bytes),
            }
        if self.metrics.writes:
            with self._kept(), self.folder.evaluated.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._tell({name: value for name, value in row.items() if name not in ("step", "test_tokens")}, step)

    def _score(self, module: PretrainingModule, tasks: Tasks, step: int) -> None:
        """Find the scores on the tasks."""
        from evaluation.language_model import RunModel

        model = RunModel(module.model, self.tokenizer, module.device, tasks.batch_tokens)
        for (name, shots), loaded in tasks.loaded.items():
            key = key_of(name, shots, tasks.limit, tasks.seed, step, "training")
            if of_rank_0(partial(self._known, key)):
                continue
            try:
                found = score_task(model, name, loaded, tasks.limit, tasks.seed)
            except TaskError as error:
                self.console.print(f"after step {step}: {name}: {error}")
                continue
            if self.metrics.writes:
                with self._kept():
                    Scores(self.folder.scores).add(key, found)
                numbers = {metric: value for metric, value in found.items() if f"{metric}_stderr" in found}
                self._tell({f"{name}/{metric}": value for metric, value in numbers.items()}, step)

    def _known(self, key: dict[str, Any]) -> bool:
        return Scores(self.folder.scores).find(key) is not None

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Write what was found; if that fails, say so, and train on."""
        try:
            yield
        except OSError as error:
            said = f"AN EVALUATION COULD NOT BE KEPT: {error}. Training goes on."
            self.console.print(said, style="bold red", markup=False)

    def _tell(self, numbers: dict[str, float], step: int) -> None:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        self.console.print(f"after step {step}: {told or 'test loss not finite'}")
        self.listener(numbers, step)
