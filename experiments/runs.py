"""Reading a run folder."""

import json
from collections.abc import Sequence
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
        evaluations: lines of `evaluations.jsonl`, on held-out text while the run trained.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    result: dict[str, Any] | None
    evaluations: Sequence[dict[str, Any]] = ()


def bad_batches(run: Run) -> list[int]:
    """Return the steps at which bad batches were put in on purpose."""
    return list(run.config.get("data", {}).get("bad_batches", {}).get("steps", []))


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
    return Run(path, config, metrics, done, [json.loads(line) for line in lines])
