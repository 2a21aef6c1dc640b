"""Evaluation of saved models: only missing scores are computed, and an interrupted evaluation resumes."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from common.errors import UserError, one_line
from common.files import sha256
from data.progress import progress
from evaluation.config import EvalConfig
from evaluation.response_cache import CachedLM, ResponseCache
from evaluation.scores import Scores, score_key, score_task
from evaluation.tasks import load_tasks

#: Endings of the files that make up a Hugging Face model.
MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt")

#: File with the scores of a model.
SCORES = "task_scores.json"


class EvaluatedModel(NamedTuple):
    """A model, and where its scores are saved.

    Attributes:
        title: its name in tables and messages.
        step: of a run's checkpoint; `None` for other models.
        model: identifies a model that is not a run; `None` for runs.
        scores: its scores so far.
        fingerprint: returns what identifies its weights.
        load: returns the model as lm-eval's `LM`.
    """

    title: str
    step: int | None
    model: str | None
    scores: Scores
    fingerprint: Callable[[], str]
    load: Callable[[], Any]


def hugging_face_model(name: str, scores: Path, device: str, dtype: str) -> EvaluatedModel:
    """Return a Hugging Face model.

    Args:
        name: a folder, or a name on the hub.
        scores: file for its scores.
        device: where it is evaluated, such as `cpu`.
        dtype: of its weights.
    """
    model = _folder_digest(Path(name)) if Path(name).is_dir() else name

    def load() -> Any:
        from lm_eval.models.huggingface import HFLM

        try:
            return HFLM(pretrained=name, device=device, dtype=dtype, batch_size=16)
        except Exception as error:  # from the hub, or the files in the folder
            raise UserError(f"hf={name} cannot be loaded ({one_line(error, 200)})") from error

    return EvaluatedModel(name, None, model, Scores(scores), lambda: model, load)


def _folder_digest(folder: Path) -> str:
    """Return a digest of the model and tokenizer in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in MODEL_FILES and path.name != SCORES:
            digest.update(path.name.encode())
            digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:16]


class Evaluator:
    """Scores models on the tasks of a configuration.

    Args:
        config: the tasks.
        dtype: of the weights.
        folders: searched for validation sets, see `evaluation.tasks.load_tasks`.
        console: for progress.
        before_task: called before each task that is scored.
    """

    def __init__(
        self, config: EvalConfig, dtype: str, folders: list[Path], console: Console, before_task: Callable[[], None]
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.folders = folders
        self.console = console
        self.before_task = before_task
        self.tasks: dict[tuple[str, int], Any] = {}

    def load_tasks(self, models: list[EvaluatedModel]) -> None:
        """Load the tasks on which a model has no score, so that missing data is an error before any work.

        Raises:
            TaskError: a task is unknown, or its data cannot be loaded.
        """
        for name, num_fewshot in self._requested():
            if any(model.scores.find(self._key(model, name, num_fewshot)) is None for model in models):
                self.tasks[name, num_fewshot] = load_tasks(name, self.folders, num_fewshot)

    def score(self, model: EvaluatedModel) -> Iterator[dict[str, Any]]:
        """Yield the scores of a model, each with the model's title as `run`. Missing ones are computed and saved.

        Raises:
            TaskError: the model has diverged, or cannot be scored on a task.
        """
        loaded: Any = None
        for name, num_fewshot in self._requested():
            score = model.scores.find(self._key(model, name, num_fewshot))
            if score is None:
                self.before_task()
                loaded = loaded or model.load()
                score = self._score(model, loaded, name, num_fewshot)
            yield {"run": model.title, **score}

    def _score(self, model: EvaluatedModel, loaded: Any, name: str, num_fewshot: int) -> dict[str, Any]:
        """Compute and save a score."""
        path = model.scores.response_cache_path(model.step, self.dtype)
        cache = ResponseCache(path, f"{model.fingerprint()} {self.dtype}")
        start = time.monotonic()
        texts, truncated = getattr(loaded, "num_texts", 0), getattr(loaded, "num_truncated", 0)
        title = f"{model.title}: {name}, {num_fewshot} shots"
        with progress(self.console) as report:
            cached_lm = CachedLM(
                loaded,
                cache.responses,
                cache.add,
                lambda done, total: report(done, total, f"{title}: {done:,} of {total:,} responses"),
            )
            task = self.tasks[name, num_fewshot]
            results = score_task(cached_lm, name, task, self.config.limit, self.config.seed)
        if new_texts := getattr(loaded, "num_texts", 0) - texts:
            results["truncated_fraction"] = round((loaded.num_truncated - truncated) / new_texts, 4)
        results["seconds"] = round(time.monotonic() - start, 1)
        score = model.scores.add(self._key(model, name, num_fewshot), results)
        cache.delete()
        return score

    def _requested(self) -> list[tuple[str, int]]:
        """Return each task and number of solved examples once."""
        return list(dict.fromkeys((name, shots) for name in self.config.tasks for shots in self.config.fewshot_list))

    def _key(self, model: EvaluatedModel, name: str, num_fewshot: int) -> dict[str, Any]:
        config = self.config
        return score_key(name, num_fewshot, config.limit, config.seed, model.step, self.dtype, model.model)
