"""Reading a run folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml


class Run(NamedTuple):
    """The contents of a run folder.

    Attributes:
        path: the folder.
        config: `config.yaml` as a nested dict.
        metrics: column name -> (steps,) float64 array; NaN where the line has null or lacks the column.
        result: `result.json`, or `None` if the run is not finished.
        val_metrics: lines of `val_metrics.jsonl`, written while the run trained.
        starts: entries of `environment.json`, one for each start.
        scores: entries of `task_scores.json`.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    result: dict[str, Any] | None
    val_metrics: Sequence[dict[str, Any]] = ()
    starts: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[dict[str, Any]] = ()

    @property
    def environment(self) -> Mapping[str, Any]:
        """The environment of the last start; empty if it is not known."""
        return self.starts[-1] if self.starts else {}

    def score(self, task: str) -> dict[str, Any] | None:
        """Return the zero-shot score of the finished run on a task; of several, the one with the most items."""
        last = (self.result or {}).get("steps")
        scores = [
            score for score in self.scores if (score["task"], score["num_fewshot"], score["step"]) == (task, 0, last)
        ]
        return max(scores, key=lambda score: score["items"], default=None)


def corrupted_steps(run: Run) -> list[int]:
    """Return the steps with injected corrupted batches, counted from 1."""
    return list(run.config.get("data", {}).get("corruption", {}).get("steps", []))


def corrupted_rows(run: Run) -> set[int]:
    """Return the indices of the corrupted batches' steps in the metrics."""
    return set(np.flatnonzero(np.isin(run.metrics["step"], corrupted_steps(run))).tolist())


def without_corrupted(run: Run, column: str) -> np.ndarray:
    """Return a column of the metrics in which values at corrupted batches are interpolated from the steps around."""
    values, corrupted = run.metrics[column], sorted(corrupted_rows(run))
    others = np.setdiff1d(np.arange(len(values)), corrupted)
    interpolated = values.copy()
    interpolated[corrupted] = np.interp(corrupted, others, values[others])
    return interpolated


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it has no `config.yaml` or no `metrics.jsonl`.
        ValueError: a file is damaged; the message names the file and the line.
    """
    config = read_config(path)
    rows = _json_lines(path / "metrics.jsonl")
    names = list(dict.fromkeys(name for row in rows for name in row))
    metrics = {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}
    result = _json(path / "result.json") if (path / "result.json").exists() else None
    validation, environment, tasks = (
        path / name for name in ("val_metrics.jsonl", "environment.json", "task_scores.json")
    )
    val_metrics = _json_lines(validation) if validation.exists() else []
    starts = _json(environment)["starts"] if environment.exists() else []
    scores = _json(tasks)["scores"] if tasks.exists() else []
    return Run(path, config, metrics, result, val_metrics, starts, scores)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run as a nested dict.

    Args:
        path: the run folder.

    Raises:
        ValueError: `config.yaml` is not YAML, or not a mapping.
    """
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config.yaml: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config.yaml: not a mapping")
    return config


@contextmanager
def _locate_errors(place: str) -> Iterator[None]:
    """Name the file, and the line, in errors about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _json(path: Path) -> Any:
    with _locate_errors(path.name):
        return json.loads(path.read_text())


def _json_lines(path: Path) -> list[Any]:
    with _locate_errors(path.name):
        lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        with _locate_errors(f"{path.name}, line {number}"):
            rows.append(json.loads(line))
    return rows
