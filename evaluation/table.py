"""Scores as a table in the terminal: fractions in percent, with standard errors."""

import sys
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from evaluation.scores import KEY

#: Fields of a score that are not metrics.
NOT_METRICS = {"run", *KEY, "items", "drawn", "truncated_fraction", "task_version", "seconds", "versions", "date"}
#: Columns within which a table is measured, more than any terminal has.
MAX_WIDTH = 10_000


def print_scores(rows: list[dict[str, Any]], console: Console) -> None:
    """Print scores, each with its model as `run`. Of one model, each score is a row; of several, each model is one.

    Models whose names have no room next to their scores are numbered, and named above the table.
    """
    names = list(dict.fromkeys(row["run"] for row in rows))
    if len(names) > 1:
        _print_models(names, rows, console)
    elif rows:
        _print_model(rows, console)
    if truncated := max((_number(row, "truncated_fraction") or 0 for row in rows), default=0):
        console.print(f"up to {truncated:.0%} of a task's texts exceed the model's context, and lost their beginnings")


def _print_model(rows: list[dict[str, Any]], console: Console) -> None:
    metrics = metrics_of(rows)
    console.print(f"{rows[0]['run']}, ± standard error")
    table = Table()
    for column in ("task", "shots", "items", *map(_header, metrics)):
        table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
    for row in rows:
        table.add_row(row["task"], str(row["num_fewshot"]), _items(row), *(_cell(row, metric) for metric in metrics))
    console.print(table, soft_wrap=False)


def _print_models(names: list[str], rows: list[dict[str, Any]], console: Console) -> None:
    tasks = list(dict.fromkeys((row["task"], row["num_fewshot"]) for row in rows))
    columns = [
        (*task, metric)
        for task in tasks
        for metric in metrics_of([row for row in rows if (row["task"], row["num_fewshot"]) == task])
    ]
    cells = {}
    for name in names:
        scores = {(row["task"], row["num_fewshot"]): row for row in rows if row["run"] == name}
        cells[name] = [_cell(scores.get((task, shots), {}), metric) for task, shots, metric in columns]
    headers = [f"{task}\n{shots} shots\n{_header(metric)}" for task, shots, metric in columns]
    table = _table(headers, cells)
    if Measurement.get(console, console.options.update_width(MAX_WIDTH), table).maximum > console.width:
        for number, name in enumerate(names, 1):
            console.print(f"{number:>2}  {name}")
        table = _table(headers, {str(number): cells[name] for number, name in enumerate(names, 1)})
    console.print(table, soft_wrap=False)
    items = {row["task"]: _items(row) for row in rows}
    console.print(f"± standard error; items: {', '.join(f'{task} {count}' for task, count in items.items())}")


def _table(headers: list[str], rows: dict[str, list[str]]) -> Table:
    table = Table()
    table.add_column("", justify="right" if all(name.isdigit() for name in rows) else "left", overflow="fold")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def metrics_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the metrics that scores have numbers of. Not every metric has a standard error."""
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_METRICS and "_stderr" not in name)
    return [name for name in names if any(_number(row, name) is not None for row in rows)]


def _number(row: dict[str, Any], name: str) -> float | None:
    """Return a number of a score; `None` if it has none of that name, or one that is none of a metric."""
    value: Any = row.get(name)
    return value if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def _items(row: dict[str, Any]) -> str:
    return f"{row['items']:,}" + (" drawn" if row.get("drawn") else "")


def _header(metric: str) -> str:
    return f"{metric} %" if _is_fraction(metric) else metric


def _is_fraction(metric: str) -> bool:
    return metric.startswith(("acc", "exact_match", "f1"))


def _cell(row: dict[str, Any], metric: str) -> str:
    value, error = _number(row, metric), _number(row, f"{metric}_stderr")
    if value is None:
        return ""
    factor = 100 if _is_fraction(metric) else 1
    return f"{factor * value:.2f}" + ("" if error is None else f" ± {factor * error:.2f}")
