"""Reading a run folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf


class Run(NamedTuple):
    """What a run folder says.

    Attributes:
        path: the folder.
        config: `config.yaml` as a nested dict.
        metrics: column name -> (steps,) float64 array; NaN where the line has null or lacks the column.
        result: `result.json`, or `None` if the run is not done.
        evaluations: lines of `val_metrics.jsonl`, on held-out text while the run trained.
        starts: entries of `environment.json`, one for each start.
        scores: of `task_scores.json`.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    result: dict[str, Any] | None
    evaluations: Sequence[dict[str, Any]] = ()
    starts: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[dict[str, Any]] = ()

    @property
    def environment(self) -> Mapping[str, Any]:
        """Where it was started last."""
        return self.starts[-1] if self.starts else {}

    def score(self, task: str) -> dict[str, Any] | None:
        """Return the score of the finished run on a task, without solved examples; of several, that of most items."""
        last = (self.result or {}).get("steps")
        own = [each for each in self.scores if (each["task"], each["num_fewshot"], each["step"]) == (task, 0, last)]
        return max(own, key=lambda score: score["items"], default=None)


def corrupted_steps(run: Run) -> list[int]:
    """Return the steps at which bad batches were put in on purpose."""
    return list(run.config.get("data", {}).get("corruption", {}).get("steps", []))


def corrupted_rows(run: Run) -> set[int]:
    """Return the indices of those steps in the metrics."""
    return set(np.flatnonzero(np.isin(run.metrics["step"], corrupted_steps(run))).tolist())


def without_corrupted(run: Run, column: str) -> np.ndarray:
    """Return a column with values at bad batches taken from the steps around them: they say nothing of the model."""
    values, at = run.metrics[column], sorted(corrupted_rows(run))
    good = np.setdiff1d(np.arange(len(values)), at)
    found = values.copy()
    found[at] = np.interp(at, good, values[good])
    return found


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it has no `config.yaml` or no `metrics.jsonl`.
        ValueError: a file is damaged; which, and where.
    """
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))  # type: ignore[assignment]
    rows = _json_lines(path / "metrics.jsonl")
    names = list(dict.fromkeys(name for row in rows for name in row))
    metrics = {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}
    result, evaluated = path / "result.json", path / "val_metrics.jsonl"
    done = _json(result) if result.exists() else None
    about, scored = path / "environment.json", path / "task_scores.json"
    starts = _json(about)["starts"] if about.exists() else []
    scores = _json(scored)["scores"] if scored.exists() else []
    return Run(path, config, metrics, done, _json_lines(evaluated) if evaluated.exists() else [], starts, scores)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Say where a damaged file is damaged."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _json(path: Path) -> Any:
    with _reading(path.name):
        return json.loads(path.read_text())


def _json_lines(path: Path) -> list[Any]:
    with _reading(path.name):
        lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        with _reading(f"{path.name}, line {number}"):
            rows.append(json.loads(line))
    return rows
