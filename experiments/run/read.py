"""Reading a run folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from common import run_files


class Run(NamedTuple):
    """The contents of a run folder."""

    path: Path
    config: dict[str, Any]  # `config.yaml`
    metrics: dict[str, np.ndarray]  # (steps,) float64 by column; NaN where the line has null or lacks the column
    result: dict[str, Any]  # `result.json`, empty if the run is not finished
    val_metrics: Sequence[dict[str, Any]]  # lines of `val_metrics.jsonl`, written while the run trained
    starts: Sequence[Mapping[str, Any]]  # entries of `environment.json`, one for each start
    scores: Sequence[dict[str, Any]]  # entries of `task_scores.json`
    rewinds: Sequence[Mapping[str, Any]] = ()  # entries of `rewinds.json`

    @property
    def environment(self) -> Mapping[str, Any]:
        """The environment of the last start; empty if it is not known."""
        return self.starts[-1] if self.starts else {}

    def score(self, task: str) -> dict[str, Any] | None:
        """Return the zero-shot score of the finished run on a task; of several, the one with the most items."""
        place = (task, 0, self.result.get("steps"))
        scores = [score for score in self.scores if (score["task"], score["num_fewshot"], score["step"]) == place]
        return max(scores, key=lambda score: score["items"], default=None)


def corrupted_steps(run: Run) -> list[int]:
    """Return the steps with injected corrupted batches, counted from 1, but for those that a rewind has skipped."""
    return run_files.corrupted_steps(run.config.get("data", {}).get("corruption", {}).get("steps", []), run.rewinds)


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
    validation = path / "val_metrics.jsonl"
    contents: dict[str, Any] = {
        "result.json": {},
        "environment.json": {"starts": []},
        "task_scores.json": {"scores": []},
        "rewinds.json": {"rewinds": []},
    }
    for name in contents:
        if (path / name).exists():
            contents[name] = _json((path / name).read_bytes(), name)
    result, environment, tasks, rewinds = contents.values()
    rewound = tuple(rewinds["rewinds"])
    val_metrics = _json_lines(validation) if validation.exists() else []
    return Run(path, config, metrics, result, val_metrics, environment["starts"], tasks["scores"], rewound)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run; raise `ValueError` if `config.yaml` is not YAML, or not a mapping."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config.yaml: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config.yaml: not a mapping")
    return config


def _json_lines(path: Path) -> list[Any]:
    lines = path.read_bytes().splitlines()
    return [_json(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1)]


def _json(raw: bytes, place: str) -> Any:
    """Return the value of a JSON text; an error names its place."""
    try:
        return json.loads(raw.decode())
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
