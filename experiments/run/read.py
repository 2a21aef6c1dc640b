"""Reading a run folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from common import run_files
from common.corruption import KINDS, MOST_STEPS, corrupted_batches
from common.errors import one_line
from common.reading import MOST_YAML, Record, check_record, parse_record, parse_yaml, read_bytes, read_lines
from common.run_files import Environment, MetricsLine, Result, Rewinds, TaskScores, as_dict

#: Largest magnitude of a value in metrics.jsonl. Sums and squares of such values are finite.
LARGEST = 1e100


class _Corruption(Record):
    steps: Sequence[int] = ()
    random_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 0
    random_first_step: Annotated[int, Field(ge=1)] = 1
    burst_length: Annotated[int, Field(ge=1)] = 1
    kind: str = KINDS[0]


class _Data(Record):
    corruption: _Corruption = _Corruption()


class _Trainer(Record):
    max_steps: int = 0


class _Config(Record):
    """What is read of a configuration here."""

    data: _Data = _Data()
    seed: int = 0
    trainer: _Trainer = _Trainer()


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
    def changes(self) -> list[dict[str, Any]]:
        """The changes of settings while it trained: `step`, `setting`, `from` and `to` of each."""
        return run_files.setting_changes(self.starts)

    @property
    def fork_step(self) -> int | None:
        """The step of another run after which it begins; its metrics up to there are the other's. `None`: step 1."""
        source = run_files.folder_and_step(str(self.config.get("fork_from")))
        return None if source is None else source[1]

    def argument(self, name: str) -> np.ndarray:
        """Return (steps,) an argument of the clipping strategy in each step, NaN where it has no number."""
        values = np.full(len(self.metrics["step"]), _number(self.config["clip"].get(name)))
        for change in self.changes:
            if change["setting"] == f"clip.{name}":
                values[self.metrics["step"] > change["step"]] = _number(change["to"])
        return values

    @property
    def environment(self) -> Mapping[str, Any]:
        """The environment of the last start; empty if it is not known."""
        return self.starts[-1] if self.starts else {}

    def score(self, task: str) -> dict[str, Any] | None:
        """Return the zero-shot score of the finished run on a task; of several, the one with the most items."""
        place = (task, 0, self.result.get("steps"))
        scores = [score for score in self.scores if (score["task"], score["num_fewshot"], score["step"]) == place]
        return max(scores, key=lambda score: score["items"], default=None)


def _number(value: Any) -> float:
    return float(value) if type(value) is float or (type(value) is int and abs(value) < 2**53) else np.nan


def corrupted_steps(run: Run) -> list[int]:
    """Return the steps with injected corrupted batches, counted from 1, but for those that a rewind has skipped."""
    return run_files.corrupted_steps(_corrupted_batches(run.config), run.rewinds)


def corruption_kinds(run: Run) -> dict[int, str]:
    """Return the kind of each of the `corrupted_steps`."""
    kinds = _corrupted_batches(run.config)
    return {step: kinds[step] for step in corrupted_steps(run)}


def _corrupted_batches(config: Mapping[str, Any]) -> dict[int, str]:
    corruption, trainer = config.get("data", {}).get("corruption", {}), config.get("trainer", {})
    return corrupted_batches(corruption, config.get("seed", 0), trainer.get("max_steps", 0))


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
        OSError: something else than a file stands in the place of one.
        ValueError: a file is damaged, or has another shape; the message names the file and the line.
    """
    config = read_config(path)
    rows = _lines(path / "metrics.jsonl", MetricsLine)
    if not rows and (path / "result.json").exists():
        raise ValueError("metrics.jsonl: all lines are lost")
    names = list(dict.fromkeys(name for row in rows for name in row))
    metrics = {name: _column(name, [row.get(name) for row in rows]) for name in names}
    result = _object(path / "result.json", Result)
    starts = _object(path / "environment.json", Environment).get("starts", [])
    scores = _object(path / "task_scores.json", TaskScores).get("scores", [])
    rewinds = _object(path / "rewinds.json", Rewinds).get("rewinds", ())
    return Run(
        path, config, metrics, result, run_files.read_validation(path / "val_metrics.jsonl"), starts, scores, rewinds
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run; raise `ValueError` if `config.yaml` is not YAML, or of another shape."""
    with _naming("config.yaml"):
        config = parse_yaml(read_bytes(path / "config.yaml", MOST_YAML))
        check_record(_Config, config)
        _corrupted_batches(config)  # raises if the steps cannot be drawn
    return config


def _column(name: str, values: list[float | None]) -> np.ndarray:
    column = np.array(values, dtype=np.float64)
    if (np.abs(column) > LARGEST).any():
        raise ValueError(f"metrics.jsonl: {name} has {column[np.abs(column) > LARGEST][0]:g}, which is no measurement")
    return column


def _lines(path: Path, shape: type[Record]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        with _naming(f"{path.name}, line {number}"):
            rows.append(as_dict(parse_record(shape, line)))
    return rows


def _object(path: Path, shape: type[Record]) -> dict[str, Any]:
    """Return the fields of the object in a file; none if there is no file."""
    if not path.exists():
        return {}
    with _naming(path.name):
        return as_dict(parse_record(shape, read_bytes(path)))


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Name the file, and the line, in errors of its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {one_line(error)}") from error
