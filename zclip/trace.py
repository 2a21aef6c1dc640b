"""The gradient norms that a run recorded, and the result of replaying them."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class NormTrace(NamedTuple):
    """Norms that a run recorded.

    Attributes:
        steps: (steps,) step numbers.
        norms: (steps,) norms before clipping; NaN where they were not finite.
        losses: (steps,) losses; `None` if the file has none.
    """

    steps: list[float]
    norms: list[float]
    losses: list[float] | None


class ReplayResult(NamedTuple):
    """Effect of one strategy on a trace.

    Attributes:
        label: arguments of the strategy that differ between results.
        norms: (steps,) norms before clipping; NaN where they were not finite.
        clipped_norms: (steps,) norms after clipping; 0 where the step would have been skipped.
        max_consecutive_clips: maximum number of consecutive clipped or skipped steps.
    """

    label: str
    norms: list[float]
    clipped_norms: list[float]
    max_consecutive_clips: int

    @property
    def clipped(self) -> list[bool]:
        """Whether each step would have been clipped or skipped."""
        return [after < before for before, after in zip(self.norms, self.clipped_norms, strict=True)]


def read_trace(path: Path, column: str, loss: str | None) -> NormTrace:
    """Read the norms of a run, and its losses and step numbers if the file has them.

    Args:
        path: JSON lines (.jsonl, .json), whose last line may be incomplete, or CSV with a header.
        column: name of the column of norms. In a CSV it may be the last part of a header, as in a wandb export.
        loss: name of the column of losses, likewise. `None`: "loss", if there is such a column.

    Raises:
        ValueError: the file cannot be read or lacks a column, a value is not a number, or a row with a norm has no
            loss.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix in (".jsonl", ".json")
        rows = _json_rows(text) if is_json else list(csv.DictReader(text.splitlines(), restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    norm_column, loss_column = _find_column(names, column), _find_column(names, loss or "loss")
    if norm_column is None or (loss and loss_column is None):
        missing = f"loss={loss}" if norm_column else f"column={column}"
        raise ValueError(f"{missing} is not in {path}: it has {', '.join(names) or 'no columns'}")
    rows = [row for row in rows if row.get(norm_column, "") != ""]
    losses = _numbers(rows, loss_column, path) if loss_column else None
    if loss_column and (without_loss := sum(row.get(loss_column, "") == "" for row in rows)):
        if loss is not None:
            raise ValueError(
                f"loss={loss} is missing in {without_loss} of the {len(rows)} rows of {path} that have a norm"
            )
        losses = None
    norms = _numbers(rows, norm_column, path)
    if any(norm < 0 for norm in norms):
        raise ValueError(f"column={norm_column} of {path} holds {min(norms):g}: a norm is not below 0")
    return NormTrace(_step_numbers(rows, names, path), norms, losses)


def _json_rows(text: str) -> list[Row]:
    rows = []
    lines = text.rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) > 1 and not text.endswith("\n"):
                break  # the run was killed while it wrote this line
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is not an object, such as {{"grad_norm": 1.5}}')
        rows.append(row)
    return rows


def _find_column(names: Sequence[str], column: str) -> str | None:
    """Return the column of this name, or the only one whose last part is this name (`RUN - NAME` in wandb exports)."""
    if column in names:
        return column
    matches = [name for name in names if name.split(" - ")[-1].strip() == column]
    return matches[0] if len(matches) == 1 else None


def _numbers(rows: Sequence[Row], column: str, path: Path) -> list[float]:
    """Return a column's values; NaN where a value is missing or not finite."""
    try:
        values = [math.nan if row.get(column) in (None, "") else float(row[column]) for row in rows]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"column={column} of {path} holds a value that is not a number: {error}") from error
    return [value if math.isfinite(value) else math.nan for value in values]


def _step_numbers(rows: Sequence[Row], names: Sequence[str], path: Path) -> list[float]:
    """Return the step numbers, or 1, 2, ... if the file has none."""
    column = next((name for name in names if name.lower() in ("step", "_step", "global_step")), None)
    try:
        steps = _numbers(rows, column, path) if column else []
    except ValueError:
        steps = []
    if steps and not any(map(math.isnan, steps)):
        return steps
    return [float(i) for i in range(1, len(rows) + 1)]
