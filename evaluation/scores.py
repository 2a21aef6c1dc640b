"""Scores of a model on tasks, each kept as soon as it is known."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.tasks import EXAMPLES_SEED, TaskError, sample

PACKAGES = ("lm_eval", "datasets", "torch", "transformers", "tokenizers")

#: What tells a score of a model from another.
KEY = ("task", "shots", "limit", "seed", "step", "dtype", "model")


def score_key(
    task: str, shots: int, limit: int | None, seed: int, step: int | None, dtype: str, model: str | None = None
) -> dict[str, Any]:
    """Return what tells a score from another; the seed does where items are drawn, the model where it is no run."""
    return dict(zip(KEY, (task, shots, limit, seed if limit else None, step, dtype, model), strict=True))


def score_task(model: Any, name: str, loaded: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """Return what lm-eval finds of a model on a task or group.

    Args:
        model: lm-eval's `LM`, or what behaves as one.
        name: of the task or group.
        loaded: see `load_tasks`.
        limit: items of each task at most, drawn at random; `None`: all.
        seed: of the draw.

    Returns:
        `items`, whether they were `drawn`, `task_version`, and the metrics, each with its `_stderr`, as `acc` and
        `acc_stderr`.

    Raises:
        TaskError: there are fewer solved examples than asked for, or the model cannot do what the task asks.
    """
    from lm_eval import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=EXAMPLES_SEED)  # the same examples for every model, whatever was drawn before
    drawn = {each: sample(len(task.eval_docs), limit, seed) for each, task in loaded["tasks"].items()}
    samples = {each: items for each, items in drawn.items() if items is not None}
    try:
        found: Any = evaluate(model, loaded, samples=samples or None, log_samples=False, bootstrap_iters=1000)
    except TaskError:
        raise
    except ValueError as error:  # of the draw of examples, of the task's own code
        raise TaskError(f"eval.tasks={name} cannot be scored ({error})") from error
    counts = [count["effective"] for count in found["n-samples"].values()]
    metrics = found["groups"][name] if name in found.get("groups", {}) else found["results"][name]
    numbers = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, int | float)}
    for key in ("sample_len", "sample_count"):
        numbers.pop(key, None)
    return {"items": sum(counts), "drawn": bool(samples), "task_version": found["versions"].get(name), **numbers}


class Scores:
    """The scores of a model, in a file.

    Args:
        path: task_scores.json.
        damaged: whether the file is known to be, and is not read.

    Raises:
        TaskError: the file is damaged.
    """

    def __init__(self, path: Path, damaged: bool = False) -> None:
        self.path = path
        self.all = [] if damaged else self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            scores = json.loads(self.path.read_text())["scores"]
            if not all(score["items"] > 0 and {"task", "shots", "step"} <= score.keys() for score in scores):
                raise ValueError("a score has no task, shots, step or items")
            return scores
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TaskError(
                f"{self.path} is damaged ({error}): remove it, and the same command makes it again"
            ) from error

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the score with this key, if it is known."""
        return next((score for score in self.all if all(score.get(name) == key[name] for name in KEY)), None)

    def answers(self, step: int | None, dtype: str) -> Path:
        """Return the file for the answers of an evaluation that is not done."""
        return self.path.with_name(f".{self.path.stem}-{step or 0}-{dtype}.jsonl")

    def forget_after(self, step: int) -> None:
        """Forget scores and answers of later steps: the run goes on from this one, and may come to others."""
        with self._alone():
            kept = [score for score in self._read() if (score["step"] or 0) <= step]
            if self.path.exists():
                self._write(kept)
        for path in self.path.parent.glob(f".{self.path.stem}-*-*.jsonl"):
            number = path.name.split("-")[1]
            if number.isdecimal() and int(number) > step:
                path.unlink()

    def put_aside(self) -> Path:
        """Rename a damaged file, and return its new name."""
        aside = self.path.with_name(f"damaged-{time.time_ns()}-{self.path.name}")
        self.path.replace(aside)
        self.all = []
        return aside

    def add(self, key: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Keep what was found, with the versions that found it."""
        versions = {package: version(package) for package in PACKAGES}
        score = {**key, **found, "versions": versions, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with self._alone():
            others = self._read()  # another process may have found some meanwhile
            self._write([other for other in others if any(other.get(name) != key[name] for name in KEY)] + [score])
        return score

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the file for this process alone."""
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, scores: list[dict[str, Any]]) -> None:
        """Have the file hold these, or what it held before, whatever happens meanwhile."""
        self.all = scores
        path = self.path.resolve()
        aside = path.with_name(f".saving-{path.name}")
        with aside.open("w") as file:
            json.dump({"scores": self.all}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
