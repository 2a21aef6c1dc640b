"""Evaluation of saved models: only missing scores are computed, and an interrupted evaluation resumes."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from common.errors import UserError, one_line
from common.files import sha256
from data.progress import progress
from evaluation.config import EvalConfig
from evaluation.response_cache import CachedLM, ResponseCache
from evaluation.scores import SCORES, Scores, score_key, score_task
from evaluation.tasks import TaskError, load_tasks

#: Endings of the files that make up a Hugging Face model.
MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt")


class EvaluatedModel(NamedTuple):
    """A model, and where its scores are saved.

    A run has a `step`; `model` identifies a model that is not a run. `fingerprint` returns what identifies the weights,
    and `load` returns the model as lm-eval's `LM`.
    """

    title: str
    step: int | None
    model: str | None
    scores: Scores
    fingerprint: Callable[[], str]
    load: Callable[[], Any]


def hugging_face_model(name: str, scores: Path, device: str, dtype: str) -> EvaluatedModel:
    """Return a Hugging Face model by its folder or its name on the hub."""
    model = _folder_digest(Path(name), scores) if Path(name).is_dir() else name

    def load() -> Any:
        from evaluation.hugging_face_lm import CompleteHFLM

        try:
            return CompleteHFLM(pretrained=name, device=device, dtype=dtype, batch_size=16)
        except Exception as error:  # from the hub, or the files in the folder
            raise UserError(f"hf={name} cannot be loaded ({one_line(error, 200)})") from error

    return EvaluatedModel(name, None, model, Scores(scores), lambda: model, load)


def _folder_digest(folder: Path, scores: Path) -> str:
    """Return a digest of the model and tokenizer in a folder, in which a file of scores may be too."""
    digest = hashlib.sha256()
    others = {folder.resolve() / SCORES, scores.resolve()}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in MODEL_FILES and folder.resolve() / path.name not in others:
            digest.update(path.name.encode())
            digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:16]


@dataclass
class Evaluator:
    """Scores models, whose weights have a data type, on the tasks of a configuration.

    Validation sets may be in some folders, see `evaluation.tasks.load_tasks`. `before_task` is called before each task.
    """

    config: EvalConfig
    dtype: str
    folders: list[Path]
    console: Console
    before_task: Callable[[], None]
    tasks: dict[tuple[str, int], Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def load_tasks(self, models: list[EvaluatedModel]) -> None:
        """Load the tasks on which a model has no score, so that missing data is an error before any work."""
        for name, num_fewshot in self.config.requested:
            if any(model.scores.find(self._key(model, name, num_fewshot)) is None for model in models):
                self.tasks[name, num_fewshot] = load_tasks(name, self.folders, num_fewshot)

    def score(self, model: EvaluatedModel) -> Iterator[dict[str, Any]]:
        """Yield the scores of a model, each with the model's title as `run`. Missing ones are computed and saved.

        A task that cannot be scored is reported, and added to `failed`; if it is the only one, it is a `TaskError`.
        """
        loaded: Any = None
        for name, num_fewshot in self.config.requested:
            score = model.scores.find(self._key(model, name, num_fewshot))
            if score is None:
                self.before_task()
                loaded = loaded or model.load()
                try:
                    score = self._score(model, loaded, name, num_fewshot)
                except TaskError as error:
                    if len(self.config.requested) == 1:
                        raise
                    self.console.print(f"skipped: {model.title}: {error}", style="yellow")
                    self.failed.append(name)
                    continue
            yield {**score, "run": model.title}

    def _score(self, model: EvaluatedModel, loaded: Any, name: str, num_fewshot: int) -> dict[str, Any]:
        """Compute and save a score."""
        path = model.scores.response_cache_path(model.step, self.dtype, model.model)
        cache = ResponseCache(path, f"{model.fingerprint()} {self.dtype}")
        start = time.monotonic()
        texts, truncated = getattr(loaded, "num_texts", 0), getattr(loaded, "num_truncated", 0)
        title = f"{model.title}: {name}, {num_fewshot} shots"
        with progress(self.console, title) as report:

            def show(done: int, total: int) -> None:
                report(done, total, f"{title}: {done:,} of {total:,} responses")

            cached_lm = CachedLM(loaded, cache.responses, cache.add, show)
            task = self.tasks[name, num_fewshot]
            results = score_task(cached_lm, name, task, self.config.limit, self.config.seed)
        if all_texts := getattr(loaded, "num_texts", 0) - texts + cached_lm.cached_texts:
            all_truncated = loaded.num_truncated - truncated + cached_lm.cached_truncated
            results["truncated_fraction"] = round(all_truncated / all_texts, 4)
        results["seconds"] = round(time.monotonic() - start, 1)
        score = model.scores.add(self._key(model, name, num_fewshot), results)
        cache.delete()
        return score

    def _key(self, model: EvaluatedModel, name: str, num_fewshot: int) -> dict[str, Any]:
        config = self.config
        return score_key(name, num_fewshot, config.limit, config.seed, model.step, self.dtype, model.model)
