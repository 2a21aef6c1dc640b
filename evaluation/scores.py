"""Scores of a model on tasks, each kept as soon as it is known."""

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.tasks import TaskError, sample

PACKAGES = ("lm_eval", "datasets", "torch", "transformers", "tokenizers")

#: What tells a score of a model from another.
KEY = ("task", "shots", "limit", "seed", "step", "dtype")


def key_of(task: str, shots: int, limit: int | None, seed: int, step: int | None, dtype: str) -> dict[str, Any]:
    """Return what tells a score from another; the seed does where items are drawn."""
    return dict(zip(KEY, (task, shots, limit, seed if limit else None, step, dtype), strict=True))


def score_task(model: Any, name: str, loaded: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """Return what lm-eval finds of a model on a task or group.

    Args:
        model: lm-eval's `LM`, or what behaves as one.
        name: of the task or group.
        loaded: see `load_tasks`.
        limit: items of each task at most, drawn at random; `None`: all.
        seed: of the draw.

    Returns:
        `items`, `task_version`, and the metrics, each with its `_stderr`, as `acc` and `acc_stderr`.
    """
    from lm_eval import evaluate

    drawn = {each: sample(len(task.eval_docs), limit, seed) for each, task in loaded["tasks"].items()}
    samples = {each: items for each, items in drawn.items() if items is not None}
    found: Any = evaluate(model, loaded, samples=samples or None, log_samples=False, bootstrap_iters=1000)
    counts = [count["effective"] for count in found["n-samples"].values()]
    metrics = found["groups"][name] if name in found.get("groups", {}) else found["results"][name]
    numbers = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, int | float)}
    for key in ("sample_len", "sample_count"):
        numbers.pop(key, None)
    return {"items": sum(counts), "task_version": found["versions"].get(name), **numbers}


class Scores:
    """The scores of a model, in a file.

    Args:
        path: eval.json.

    Raises:
        TaskError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            return json.loads(self.path.read_text())["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(
                f"{self.path} is damaged ({error}): remove it, and the same command makes it again"
            ) from error

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the score with this key, if it is known."""
        return next((score for score in self.all if all(score.get(name) == key[name] for name in KEY)), None)

    def forget_after(self, step: int) -> None:
        """Forget the scores of later steps: the run goes on from this one, and may come to others."""
        kept = [score for score in self.all if (score["step"] or 0) <= step]
        if kept != self.all:
            self._write(kept)

    def add(self, key: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Keep what was found, with the versions that found it."""
        versions = {package: version(package) for package in PACKAGES}
        score = {**key, **found, "versions": versions, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        others = self._read()  # another process may have found some meanwhile
        self._write([other for other in others if any(other.get(name) != key[name] for name in KEY)] + [score])
        return score

    def _write(self, scores: list[dict[str, Any]]) -> None:
        """Have the file hold these, or what it held before, whatever happens meanwhile."""
        self.all = scores
        aside = self.path.with_name(f".saving-{self.path.name}")
        with aside.open("w") as file:
            json.dump({"scores": self.all}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)
