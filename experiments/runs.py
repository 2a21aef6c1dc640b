"""Reading a run folder."""

import json
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
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    result: dict[str, Any] | None


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
    result = path / "result.json"
    return Run(path, config, metrics, json.loads(result.read_text()) if result.exists() else None)
