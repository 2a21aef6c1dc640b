"""The gradient norms that a run recorded, and the result of replaying them."""

import csv
import io
import json
import math
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

#: Largest file that is read, in bytes: two million steps of a run's metrics.jsonl.
MAX_BYTES = 1 << 30
#: Values that are not finite as texts, which JSON writes because it has no numbers for them.
NONFINITE = ("nan", "inf", "-inf", "infinity", "-infinity")


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
        text = _read_text(path)
        if path.suffix in (".jsonl", ".json"):
            rows = _json_rows(text)
            names = list(dict.fromkeys(name for row in rows for name in row))
        else:
            rows, names = _csv_rows(text)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    norm_column, loss_column = _find_column(names, column), _find_column(names, loss or "loss")
    if norm_column is None or (loss and loss_column is None):
        missing = f"loss={loss}" if norm_column else f"column={column}"
        raise ValueError(f"{missing} is not in {path}: it has {_listed(names) or 'no columns'}")
    repeated = next(
        (name for name, count in Counter(names).items() if count > 1 and name in (norm_column, loss_column)), None
    )
    if repeated is not None:
        raise ValueError(f"{path} cannot be read: it has several columns {printable(repeated)}")
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
        raise ValueError(f"column={printable(norm_column)} of {path} holds {min(norms):g}: a norm is not below 0")
    return NormTrace(_step_numbers(rows, names, path), norms, losses)


def _read_text(path: Path) -> str:
    """Return the text of a regular file; opening anything else may wait for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return content.decode("utf-8-sig")


def printable(text: str, most: int = 80) -> str:
    """Return a text from a file in one line of at most `most` characters, without control characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return escaped if len(text) <= most else f"{escaped}..."


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*map(printable, names[:20]), *(["..."] if len(names) > 20 else [])])


def _json_rows(text: str) -> list[Row]:
    rows = []
    lines = text.rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"line {number} is nested too deeply") from error
        except ValueError as error:
            if number == len(lines) > 1 and not text.endswith("\n"):
                break  # the run was killed while it wrote this line
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is not an object, such as {{"grad_norm": 1.5}}')
        rows.append(row)
    return rows


def _csv_rows(text: str) -> tuple[list[Row], list[str]]:
    """Return the rows and the header; values behind the last column are left out."""
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    rows = [{name: value for name, value in row.items() if isinstance(name, str)} for row in reader]
    return rows, list(reader.fieldnames or ())


def _find_column(names: Sequence[str], column: str) -> str | None:
    """Return the column of this name, or the only one whose last part is this name (`RUN - NAME` in wandb exports)."""
    if column in names:
        return column
    matches = [name for name in names if name.split(" - ")[-1].strip() == column]
    return matches[0] if len(matches) == 1 else None


def _numbers(rows: Sequence[Row], column: str, path: Path) -> list[float]:
    """Return a column's values; NaN where a value is missing or not finite."""
    is_csv = path.suffix not in (".jsonl", ".json")
    try:
        values = [_number(row.get(column), is_csv) for row in rows]
    except (TypeError, ValueError, OverflowError) as error:
        reason = printable(str(error), 300)
        raise ValueError(
            f"column={printable(column)} of {path} holds a value that is not a number: {reason}"
        ) from error
    return [value if math.isfinite(value) else math.nan for value in values]


def _number(value: Any, is_csv: bool) -> float:
    """Return a number. A text is one in CSV, where all are texts, or if it means NaN or infinity."""
    if value in (None, ""):
        return math.nan
    if isinstance(value, str) and not is_csv and value.strip().lower() not in NONFINITE:
        raise ValueError(f"could not convert the text {value[:80]!r}")
    if isinstance(value, str) and (not value.isascii() or "_" in value):
        raise ValueError(f"could not convert {value[:80]!r}")  # Python's own literals, such as 1_000
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"it is a {type(value).__name__}")
    return float(value)


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
