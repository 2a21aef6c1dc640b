"""Scores on lm-eval's tasks every `trainer.eval_every` steps, in task_scores.json.

If a signal arrives while tasks are scored, the run saves that step. The responses so far are kept, and the evaluation
continues with them when the run resumes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from common.text import every
from data import Tokenizer
from evaluation.response_cache import CachedLM, ResponseCache
from evaluation.scores import Scores, quarantine, score_key, score_task, stderr_of
from evaluation.table import metrics_of
from evaluation.tasks import TaskError, check_data_dir, data_folders, load_tasks
from models import Llama
from training.config.schema import Config
from training.run_dir import RunDir
from training.runtime.distributed import broadcast_from_rank0, rank
from training.validation.report import EvaluationReport

#: Tasks with their data, by name and number of few-shot examples.
LoadedTasks = Mapping[tuple[str, int], Any]


def load_run_tasks(config: Config) -> LoadedTasks:
    """Return the tasks that a run is evaluated on while it trains: none if `trainer.eval_every` is null.

    Raises:
        ConfigError: `eval.data_dir` lacks the data of a task, or a task has too few examples for `eval.num_fewshot`.
        TaskError: a task is unknown, or its data cannot be read.
    """
    if config.trainer.eval_every is None:
        return {}
    check_data_dir(config.eval.data_dir, config.eval.tasks)
    folders = data_folders(config.eval.data_dir, config.paths.cache)
    return {(name, num_fewshot): load_tasks(name, folders, num_fewshot) for name, num_fewshot in config.eval.requested}


@dataclass
class TaskEvaluator:
    """Scores the model on tasks during training, every `trainer.eval_every` steps.

    Training waits for it and is not changed: no random number of the run is drawn, and no gradient is computed.
    """

    run_dir: RunDir
    config: Config
    tasks: LoadedTasks
    tokenizer: Tokenizer
    should_stop: Callable[[], bool]  # all processes call it now and then; whether to end early, the same in all
    report: EvaluationReport

    def __post_init__(self) -> None:
        self.every = self.config.trainer.eval_every
        self.dtype = "float32" if self.config.trainer.precision == "32-true" else "training"
        self._cache: ResponseCache | None = None  # on rank 0
        self._failed: list[dict[str, Any]] = []  # keys of scores; read on rank 0

    def start(self, step: int) -> None:
        """Drop the scores of later steps than the one that the run resumes from: they will be computed again."""
        if rank() == 0:
            self._scores().remove_after(step)

    def is_due(self, step: int) -> bool:
        """Whether the tasks are to be scored after a step."""
        return self.every is not None and step % self.every == 0

    def evaluate(self, step: int, model: Llama, device: torch.device) -> None:
        """Score the tasks after a step, except those that have a score or could not be scored. All processes call it.

        If training is to stop, it raises `EvaluationInterrupted`.
        """
        from evaluation.language_model import LlamaLM

        language_model = LlamaLM(model, self.tokenizer, device, self.config.eval.batch_tokens)
        with torch.compiler.set_stance("force_eager"):  # each batch has another shape
            for (name, num_fewshot), task in self.tasks.items():
                self._evaluate_task(step, language_model, name, num_fewshot, task)

    def _evaluate_task(self, step: int, language_model: Any, name: str, num_fewshot: int, task: Any) -> None:
        limit, seed = self.config.eval.limit, self.config.eval.seed
        key = score_key(name, num_fewshot, limit, seed, step, self.dtype)
        responses = broadcast_from_rank0(partial(self._known_responses, key))
        if responses is None:
            return
        progress = self._progress(f"after step {step}: {name}")
        cached = CachedLM(language_model, responses, self._keep_responses, progress, self.should_stop)
        try:
            score = score_task(cached, name, task, limit, seed)
        except TaskError as error:
            self._failed.append(key)
            self.report.console.print(f"after step {step}: {name}: {error}")
            return
        if rank() == 0:
            with self.report.tolerate_io_errors():
                self._scores().add(key, score)
                if self._cache is not None:
                    self._cache.delete()
            metrics = metrics_of([score])
            texts = [f"{metric} {score[metric]:.4g}{_error(score, metric)}" for metric in metrics]
            names = [each for metric in metrics for each in (metric, stderr_of(metric))]
            logged = name if isinstance(self.config.eval.num_fewshot, int) else f"{name}_{num_fewshot}_shots"
            self.report.report(
                step,
                f"{name} ({num_fewshot} shots, {score['items']:,} items): {', '.join(texts)}",
                {f"{logged}/{each}": score[each] for each in names if score.get(each) is not None},
            )

    def _known_responses(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the responses of an interrupted evaluation; `None` if there is a score, or there can be none."""
        scores = self._scores()
        if key in self._failed or scores.find(key) is not None:
            return None
        self._cache = None
        with self.report.tolerate_io_errors():
            self._cache = ResponseCache(
                scores.response_cache_path(key["step"], self.dtype), f"{self.run_dir.path.name} {key['step']}"
            )
        return {} if self._cache is None else self._cache.responses

    def _keep_responses(self, responses: Mapping[str, Any]) -> None:
        if self._cache is not None:
            with self.report.tolerate_io_errors():
                self._cache.add(responses)

    def _scores(self) -> Scores:
        """Return the scores of the run. A damaged file is renamed first."""
        try:
            return Scores(self.run_dir.scores_file)
        except TaskError as error:
            renamed = quarantine(self.run_dir.scores_file).name
            self.report.console.print(f"{error}. It is renamed to {renamed}.", style="bold red", markup=False)
            return Scores(self.run_dir.scores_file)

    def _progress(self, title: str) -> Callable[[int, int], None]:
        """Return a function that reports now and then how many requests are answered."""
        line_due = every()

        def report(done: int, total: int) -> None:
            if line_due():
                self.report.console.print(f"{title}: {done:,} of {total:,} answers")

        return report


def _error(score: Mapping[str, Any], metric: str) -> str:
    """Return the standard error of a metric as text; nothing if it has none, as of a single item."""
    error = score.get(stderr_of(metric))
    return "" if error is None else f" ± {error:.2g}"
