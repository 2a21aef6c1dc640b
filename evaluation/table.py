"""Scores as a table in the terminal: fractions in percent, with standard errors."""

import sys
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from evaluation.scores import KEY, is_stderr, stderr_of

#: Fields of a score that are not metrics.
NOT_METRICS = {"run", *KEY, "items", "drawn", "truncated_fraction", "task_version", "seconds", "versions", "date"}
#: Columns within which a table is measured, more than any terminal has.
MAX_WIDTH = 10_000
#: Size of a number that can be shown, in percent too.
MAX_NUMBER = sys.float_info.max / 100
#: Size from which on a number is shown with an exponent.
MAX_PLAIN = 1e7


class _Column(NamedTuple):
    header: str
    cells: list[str]
    justify: Literal["left", "right"] = "right"


def print_scores(rows: list[dict[str, Any]], console: Console) -> None:
    """Print scores, each with its model as `run`. Of one model, each score is a row; of several, each model is one.

    Nothing is cut: where a table is wider than the console, its rows are numbered, and named above. If it still has no
    room, there is a table for each task, or for fewer metrics.
    """
    names = list(dict.fromkeys(row["run"] for row in rows))
    if len(names) > 1:
        _print_models(names, rows, console)
    elif rows:
        _print_model(rows, console)
    if truncated := max((_number(row, "truncated_fraction") or 0 for row in rows), default=0):
        console.print(f"up to {truncated:.0%} of a task's texts exceed the model's context, and lost their beginnings")


def _print_model(rows: list[dict[str, Any]], console: Console) -> None:
    console.print(f"{rows[0]['run']}, ± standard error", soft_wrap=True)
    names = [
        _Column("task", [row["task"] for row in rows], "left"),
        _Column("shots", [str(row["num_fewshot"]) for row in rows]),
        _Column("items", [_items(row) for row in rows]),
    ]
    titles = [f"{row['task']}, {row['num_fewshot']} shots, {_items(row)} items" for row in rows]
    metrics = [[_Column(_header(metric), [_cell(row, metric) for row in rows])] for metric in metrics_of(rows)]
    _print_columns(names, titles, metrics, console)


def _print_models(names: list[str], rows: list[dict[str, Any]], console: Console) -> None:
    tasks = []
    for task, shots in dict.fromkeys((row["task"], row["num_fewshot"]) for row in rows):
        scores = {row["run"]: row for row in rows if (row["task"], row["num_fewshot"]) == (task, shots)}
        columns = []
        for metric in metrics_of([*scores.values()]):
            cells = [_cell(scores.get(name, {}), metric) for name in names]
            columns.append(_Column(f"{task}\n{shots} shots\n{_header(metric)}", cells))
        tasks.append(columns)
    _print_columns([_Column("", names, "left")], names, tasks, console)
    items = {row["task"]: _items(row) for row in rows}
    text = f"± standard error; items: {', '.join(f'{task} {count}' for task, count in items.items())}"
    console.print(text, soft_wrap=True)


def _print_columns(names: list[_Column], titles: list[str], groups: list[list[_Column]], console: Console) -> None:
    """Print columns side by side, after those that name the rows; or numbers, with the rows' titles above."""
    columns = [column for group in groups for column in group]
    if _fits([*names, *columns], console):
        console.print(_table([*names, *columns]), soft_wrap=False)
        return
    for number, title in enumerate(titles, 1):
        console.print(f"{number:>2}  {title}", soft_wrap=True)
    numbers = _Column("", [str(number) for number in range(1, len(titles) + 1)])
    for part in _parts(numbers, groups, console) or [[]]:
        console.print(_table([numbers, *part]), soft_wrap=False)


def _parts(numbers: _Column, groups: list[list[_Column]], console: Console) -> list[list[_Column]]:
    """Return the columns of as many tables as the console needs. Groups stay whole where that is possible."""
    parts: list[list[_Column]] = []
    for group in groups:
        if parts and _fits([numbers, *parts[-1], *group], console):
            parts[-1] += group
        elif _fits([numbers, *group], console):
            parts.append([*group])
        else:
            parts += _parts(numbers, [[column] for column in group], console) if len(group) > 1 else [group]
    return parts


def _fits(columns: list[_Column], console: Console) -> bool:
    widest = console.options.update_width(MAX_WIDTH)
    return Measurement.get(console, widest, _table(columns)).maximum <= console.width


def _table(columns: list[_Column]) -> Table:
    """Return a table whose first column keeps its width. The others break their texts if even one has no room."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column.header, justify=column.justify, overflow="fold", no_wrap=number == 0)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def metrics_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the metrics that scores have numbers of. Not every metric has a standard error."""
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_METRICS and not is_stderr(name))
    return [name for name in names if any(_number(row, name) is not None for row in rows)]


def _number(row: dict[str, Any], name: str) -> float | None:
    """Return a number of a score; `None` if it has none of that name, or one that is none of a metric."""
    value: Any = row.get(name)
    return value if type(value) in (int, float) and abs(value) <= MAX_NUMBER else None


def _items(row: dict[str, Any]) -> str:
    return f"{row['items']:,}" + (" drawn" if row.get("drawn") else "")


def _header(metric: str) -> str:
    return f"{metric} %" if _is_fraction(metric) else metric


def _is_fraction(metric: str) -> bool:
    return metric.startswith(("acc", "exact_match", "f1"))


def _cell(row: dict[str, Any], metric: str) -> str:
    value, error = _number(row, metric), _number(row, stderr_of(metric))
    if value is None:
        return ""
    factor = 100 if _is_fraction(metric) else 1
    return _text(factor * value) + ("" if error is None else f" ± {_text(factor * error)}")


def _text(value: float) -> str:
    return f"{value:.2f}" if abs(value) < MAX_PLAIN else f"{value:.4g}"
