"""Scores of a model on tasks. Each is saved as soon as it is computed."""

import glob
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.errors import one_line
from common.files import hold_lock, write_atomic
from common.reading import damage, parse_record, read_bytes
from common.run_files import TaskScores, as_dict
from evaluation.response_cache import EvaluationInterrupted
from evaluation.tasks import FEWSHOT_SEED, TaskError, sample

#: File with the scores of a model.
SCORES = "task_scores.json"

PACKAGES = ("lm_eval", "datasets", "torch", "transformers", "tokenizers")

#: Fields that identify a score.
KEY = ("task", "num_fewshot", "limit", "seed", "step", "dtype", "model")


def score_key(
    task: str, num_fewshot: int, limit: int | None, seed: int, step: int | None, dtype: str, model: str | None = None
) -> dict[str, Any]:
    """Return the fields that identify a score, see `EvalConfig` and `EvaluatedModel`; the seed only with a limit."""
    return dict(zip(KEY, (task, num_fewshot, limit, seed if limit else None, step, dtype, model), strict=True))


def score_task(model: Any, name: str, loaded: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """Return the results of lm-eval's `LM`, or an object with its methods, on a task or group from `load_tasks`.

    They are `items`, whether they were `drawn`, `task_version`, and the metrics, each with its standard error, such as
    `acc` and `acc_stderr`. Each number is an int or a finite float, as it is when it is read from a file.

    Raises:
        TaskError: the model does not support the task, or the task's own code fails.
    """
    from lm_eval import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for every model, whatever was drawn before
    drawn = {task_name: sample(len(task.eval_docs), limit, seed) for task_name, task in loaded["tasks"].items()}
    samples = {task_name: items for task_name, items in drawn.items() if items is not None}
    try:
        with _quiet_bootstrap():
            results: Any = evaluate(model, loaded, samples=samples or None, log_samples=False, bootstrap_iters=1000)
    except (TaskError, EvaluationInterrupted):
        raise
    except Exception as error:  # from the draw of examples, the task's own code, or a model that does not support it
        of_machine = isinstance(error, RuntimeError | OSError | MemoryError) and not isinstance(
            error, NotImplementedError
        )
        if of_machine and error is getattr(model, "model_error", None):
            raise
        kind = "" if isinstance(error, ValueError) else type(error).__name__
        reason = " ".join(filter(None, [kind, one_line(error, 200)]))
        raise TaskError(f"eval.tasks={name} cannot be scored ({reason})") from error
    counts = [count["effective"] for count in results["n-samples"].values()]
    metrics = results["groups"][name] if name in results.get("groups", {}) else results["results"][name]
    numbers = {
        key.removesuffix(",none"): number
        for key, value in metrics.items()
        if key not in ("sample_len", "sample_count") and (number := _plain_number(value)) is not None
    }
    return {"items": sum(counts), "drawn": bool(samples), "task_version": results["versions"].get(name), **numbers}


@contextmanager
def _quiet_bootstrap() -> Iterator[None]:
    """Let lm-eval draw its bootstrap samples in this process, without the line that it prints for each metric.

    The samples are one chunk, which its pool of processes, one for each CPU, computes in one of them.
    """
    from lm_eval.api import metrics

    names, variable = vars(metrics), "DISABLE_MULTIPROC"
    before = os.environ.get(variable)
    names["print"], os.environ[variable] = lambda *_, **__: None, "1"
    try:
        yield
    finally:
        names.pop("print", None)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def stderr_of(metric: str) -> str:
    """Return the name of a metric's standard error: lm-eval writes that of `a,filter` as `a_stderr,filter`."""
    name, comma, of_filter = metric.partition(",")
    return f"{name}_stderr{comma}{of_filter}"


def is_stderr(name: str) -> bool:
    """Return whether a name is that of a standard error."""
    return name.partition(",")[0].endswith("_stderr")


def _plain_number(value: Any) -> int | float | None:
    """Return a number of Python, NumPy or torch as one of JSON; `None` for anything else, or if it is not finite."""
    with suppress(AttributeError, ValueError, RuntimeError):
        value = value.item()  # of an array, tensor or scalar with one element
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return int(value) if isinstance(value, int) else float(value)


class Scores:
    """All scores of a model, in a file. Several processes may add to it at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path.with_name(f".{path.name}.lock")
        self.all = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            return [as_dict(score) for score in parse_record(TaskScores, read_bytes(self.path)).scores]
        except (OSError, ValueError) as error:
            advice = "restore it, or move it away to compute its scores again"
            raise TaskError(damage(self.path, error, advice)) from error

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the score with this key, or `None`."""
        return next((score for score in self.all if _has_key(score, key)), None)

    def response_cache_path(self, step: int | None, dtype: str, model: str | None = None) -> Path:
        """Return the file for the responses of an evaluation that is not finished; no two models share it."""
        name = f".{self.path.stem}-{step or 0}-{dtype}"
        name += "" if model is None else f"-{hashlib.sha256(model.encode()).hexdigest()[:16]}"
        return self.path.with_name(f"{name}.jsonl")

    def remove_after(self, step: int) -> None:
        """Remove scores and cached responses of later steps: a run that resumes at this step may differ after it."""
        with hold_lock(self._lock):
            scores = [score for score in self._read() if (score["step"] or 0) <= step]
            if self.path.exists():
                self._write(scores)
        for path in self.path.parent.glob(f".{glob.escape(self.path.stem)}-*-*.jsonl"):
            number = path.name.removeprefix(f".{self.path.stem}-").split("-")[0]
            if number.isdecimal() and int(number) > step:
                path.unlink()

    def add(self, key: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        """Save results with the versions of the packages that computed them, and return the score."""
        versions = {package: version(package) for package in PACKAGES}
        score = {**key, **results, "versions": versions, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with hold_lock(self._lock):
            others = self._read()  # another process may have added scores
            self._write([other for other in others if not _has_key(other, key)] + [score])
        return score

    def _write(self, scores: list[dict[str, Any]]) -> None:
        self.all = scores
        write_atomic(self.path, json.dumps({"scores": scores}, indent=1))


def quarantine(path: Path) -> Path:
    """Rename a damaged file, and return its new path."""
    return path.replace(path.with_name(f"damaged-{time.time_ns()}-{path.name}"))


def _has_key(score: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(score.get(name) == key[name] for name in KEY)
