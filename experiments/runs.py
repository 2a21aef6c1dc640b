"""Reading a run folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
        evaluations: lines of `evaluations.jsonl`, on held-out text while the run trained.
        environment: last entry of `environment.json`.
        scores: of `eval.json`.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    result: dict[str, Any] | None
    evaluations: Sequence[dict[str, Any]] = ()
    environment: Mapping[str, Any] = MappingProxyType({})
    scores: Sequence[dict[str, Any]] = ()

    def score(self, task: str) -> dict[str, Any] | None:
        """Return the score of the last step on a task, without solved examples; of several, that of the most items."""
        own = [score for score in self.scores if score["task"] == task and score["shots"] == 0]
        last = [score for score in own if score["step"] == max(other["step"] for other in own)]
        return max(last, key=lambda score: score["items"], default=None)


def bad_batches(run: Run) -> list[int]:
    """Return the steps at which bad batches were put in on purpose."""
    return list(run.config.get("data", {}).get("bad_batches", {}).get("steps", []))


def left_out(run: Run) -> set[int]:
    """Return the indices of those steps in the metrics."""
    return set(np.flatnonzero(np.isin(run.metrics["step"], bad_batches(run))).tolist())


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it has no `config.yaml` or no `metrics.jsonl`.
    """
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))  # type: ignore[assignment]
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    metrics = {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}
    result, evaluated = path / "result.json", path / "evaluations.jsonl"
    lines = evaluated.read_text().splitlines() if evaluated.exists() else []
    done = json.loads(result.read_text()) if result.exists() else None
    about, scored = path / "environment.json", path / "eval.json"
    starts = json.loads(about.read_text())["starts"] if about.exists() else []
    scores = json.loads(scored.read_text())["scores"] if scored.exists() else []
    environment = starts[-1] if starts else {}
    return Run(path, config, metrics, done, [json.loads(line) for line in lines], environment, scores)
