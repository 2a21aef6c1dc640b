"""Evaluations while a run trains: loss on held-out text, and tasks of lm-eval, each every so many steps.

They are lines of val_metrics.jsonl and scores in task_scores.json. One that is due at the step from which a run continues, and
is not there, is done first. Training waits, and is not changed: nothing random is drawn, no gradient made. Told to stop
while tasks are scored, a run saves this step; the answers so far are kept.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from common.files import write_atomic
from common.text import SECONDS_BETWEEN_LINES
from data import TextEncoder
from evaluation.response_cache import ResponseCache, CachedLM, EvaluationInterrupted
from evaluation.scores import Scores, score_key, score_task
from evaluation.tasks import TaskError
from training.checkpoint.manager import Checkpoints
from training.module import PretrainingModule
from training.monitor.metrics import Metrics
from training.run_dir import RunDir
from training.runtime.coordinated_stop import CoordinatedStop
from training.runtime.distributed import broadcast_from_rank0, rank
from training.validation.validation_set import ValidationSet, bits_per_byte


class Tasks(NamedTuple):
    """Tasks of lm-eval, ready to be scored.

    Attributes:
        loaded: by name and number of solved examples.
        limit, seed: see `evaluation.scores.score_task`.
        batch_tokens: see `evaluation.language_model.LlamaLM`.
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
        held_out: to be evaluated every `val_every` steps; `None`: never.
        tasks: to be scored every `eval_every` steps; `None`: never.
        tokenizer: of the model.
        dtype: in which the model computes.
        stopping: asked whether to stop.
        checkpoints: save the step at which it does.
        listener: called on rank 0 with the numbers of an evaluation and its step.
        console: told the numbers.
    """

    def __init__(
        self,
        folder: RunDir,
        metrics: Metrics,
        held_out: ValidationSet,
        val_every: int | None,
        tasks: Tasks | None,
        eval_every: int | None,
        tokenizer: TextEncoder,
        dtype: str,
        stopping: CoordinatedStop,
        checkpoints: Checkpoints,
        listener: Callable[[dict[str, float], int], None],
        console: Console,
    ) -> None:
        self.folder = folder
        self.metrics = metrics
        self.held_out = held_out
        self.val_every = val_every
        self.tasks = tasks
        self.eval_every = eval_every
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.stopping = stopping
        self.checkpoints = checkpoints
        self.listener = listener
        self.console = console
        self._bytes: int | None = None
        self._answers: ResponseCache | None = None  # on rank 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what was found after the step from which the run goes on; do what is due there."""
        if trainer.is_global_zero:
            kept = [row for row in self.folder.evaluations() if row["step"] <= trainer.global_step]
            if kept or self.folder.evaluated.exists():
                write_atomic(self.folder.evaluated, "".join(json.dumps(row) + "\n" for row in kept))
            self._scores().remove_after(trainer.global_step)
        if trainer.global_step:
            self._evaluate(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the tasks after the last step, if the run was killed before that was done."""
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
        test = self.val_every is not None and step % self.val_every == 0 and step < trainer.max_steps
        score = self.eval_every is not None and step % self.eval_every == 0
        if not (test or score):
            return
        self.metrics.flush(trainer, pl_module)  # so that the steps before are on the disk, and told
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                if test and step not in broadcast_from_rank0(
                    lambda: [row["step"] for row in self.folder.evaluations()]
                ):
                    self._test(trainer, pl_module, step)
                if score and self.tasks is not None:
                    with torch.compiler.set_stance("force_eager"):  # of as many shapes as there are batches
                        self._score(pl_module, self.tasks, step)
        except EvaluationInterrupted:
            trainer.should_stop = True
            self.checkpoints.save_if_due(trainer, pl_module)
        if isinstance(pl_module.model, FSDPModule):
            pl_module.model.reshard()  # what a forward pass without a backward pass leaves gathered
        self.metrics.clock.mark("evaluation")

    def _test(self, trainer: pl.Trainer, module: PretrainingModule, step: int) -> None:
        """Find the loss on held-out text."""
        loss = module.evaluate(self.held_out)
        if rank() > 0:
            return
        if self._bytes is None:
            self._bytes = self.held_out.bytes(self.tokenizer)
        row: dict[str, Any] = {"step": step, "test_tokens": self.held_out.tokens}
        if math.isfinite(loss):
            row |= {
                "test_loss": loss,
                "test_perplexity": math.exp(min(loss, 700.0)),
                "test_bits_per_byte": bits_per_byte(loss, self.held_out.tokens, self._bytes),
            }
        with self._kept(), self.folder.evaluated.open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {name: value for name, value in row.items() if name not in ("step", "test_tokens")}
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        self._tell(told or "test loss not finite", numbers, step)

    def _score(self, module: PretrainingModule, tasks: Tasks, step: int) -> None:
        """Find the scores on the tasks."""
        from evaluation.language_model import LlamaLM

        model = LlamaLM(module.model, self.tokenizer, module.device, tasks.batch_tokens)
        for (name, shots), loaded in tasks.loaded.items():
            key = score_key(name, shots, tasks.limit, tasks.seed, step, self.dtype)
            known = broadcast_from_rank0(partial(self._known, key))
            if known is None:
                continue
            remembering = CachedLM(
                model, known, self._keep, self._progress(f"after step {step}: {name}"), self.stopping.agree
            )
            try:
                found = score_task(remembering, name, loaded, tasks.limit, tasks.seed)
            except TaskError as error:
                self.console.print(f"after step {step}: {name}: {error}")
                continue
            if rank() == 0:
                with self._kept():
                    self._scores().add(key, found)
                    if self._answers is not None:
                        self._answers.delete()
                numbers = {metric: value for metric, value in found.items() if f"{metric}_stderr" in found}
                told = ", ".join(
                    f"{metric} {value:.4g} ± {found[f'{metric}_stderr']:.2g}" for metric, value in numbers.items()
                )
                named = {f"{name}/{metric}": value for metric, value in numbers.items()}
                self._tell(f"{name} ({shots} shots, {found['items']:,} items): {told}", named, step)

    def _known(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return what is answered already; `None` if there is a score."""
        scores = self._scores()
        if scores.find(key) is not None:
            return None
        self._answers = None
        with self._kept():
            self._answers = ResponseCache(scores.response_cache_path(key["step"], self.dtype), f"{self.folder.path.name} {key['step']}")
        return {} if self._answers is None else self._answers.responses

    def _keep(self, found: Mapping[str, Any]) -> None:
        if self._answers is not None:
            with self._kept():
                self._answers.add(found)

    def _scores(self) -> Scores:
        """Return the scores of the run; those in a damaged file are put aside."""
        try:
            return Scores(self.folder.scores)
        except TaskError as error:
            scores = Scores(self.folder.scores, damaged=True)
            self.console.print(
                f"{error}. It is put aside as {scores.quarantine().name}.", style="bold red", markup=False
            )
            return scores

    def _progress(self, title: str) -> Callable[[int, int], None]:
        """Return what tells now and then how many requests are answered."""
        said = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.console.print(f"{title}: {done:,} of {total:,} answers")

        return tell

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Write what was found; if that fails, say so, and train on."""
        try:
            yield
        except OSError as error:
            said = f"AN EVALUATION COULD NOT BE KEPT: {error}. Training goes on."
            self.console.print(said, style="bold red", markup=False)

    def _tell(self, said: str, numbers: dict[str, float], step: int) -> None:
        self.console.print(f"after step {step}: {said}")
        self.listener(numbers, step)
