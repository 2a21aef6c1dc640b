"""Scores as a person sees them: shares in percent, with standard errors."""

from typing import Any

from rich.console import Console
from rich.table import Table

from evaluation.scores import KEY

#: What a score has beside its metrics.
OTHERS = {"run", *KEY, "items", "drawn", "cut_share", "task_version", "seconds", "versions", "date"}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the scores with their standard errors; shares in percent. Of several models, a row each."""
    titles = list(dict.fromkeys(row["run"] for row in rows))
    if len(titles) > 1:
        _show_several(titles, rows, console)
    elif rows:
        _show_one(rows, console)
    if cut := max((row.get("cut_share") or 0 for row in rows), default=0):
        console.print(
            f"up to {cut:.0%} of what a task asks is longer than the model sees, and was cut at its beginning"
        )


def _metrics(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name not in OTHERS and "_stderr" not in name))


def _items(row: dict[str, Any]) -> str:
    return f"{row['items']:,}" + (" drawn" if row.get("drawn") else "")


def _headed(metric: str) -> str:
    return f"{metric} %" if _is_share(metric) else metric


def _show_one(rows: list[dict[str, Any]], console: Console) -> None:
    metrics = _metrics(rows)
    console.print(f"{rows[0]['run']}, ± standard error")
    table = Table()
    for column in ("task", "shots", "items", *map(_headed, metrics)):
        table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
    for row in rows:
        shown = (_shown(row, metric) for metric in metrics)
        table.add_row(row["task"], str(row["shots"]), _items(row), *shown)
    console.print(table, soft_wrap=False)


def _show_several(titles: list[str], rows: list[dict[str, Any]], console: Console) -> None:
    asked = list(dict.fromkeys((row["task"], row["shots"]) for row in rows))
    columns = [
        (*each, metric)
        for each in asked
        for metric in _metrics([row for row in rows if (row["task"], row["shots"]) == each])
    ]
    table = Table()
    table.add_column("", overflow="fold")
    for task, shots, metric in columns:
        table.add_column(f"{task}\n{shots} shots\n{_headed(metric)}", justify="right", no_wrap=True)
    for title in titles:
        own = {(row["task"], row["shots"]): row for row in rows if row["run"] == title}
        cells = [_shown(own[task, shots], metric) if (task, shots) in own else "" for task, shots, metric in columns]
        table.add_row(title, *cells)
    console.print(table, soft_wrap=False)
    items = {task: _items(row) for row in rows for task in [row["task"]]}
    console.print(f"± standard error; items: {', '.join(f'{task} {many}' for task, many in items.items())}")


def _is_share(metric: str) -> bool:
    return metric.startswith(("acc", "exact_match", "f1"))


def _shown(row: dict[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    times = 100 if _is_share(metric) else 1
    error = row.get(f"{metric}_stderr")
    return f"{times * row[metric]:.2f}" + ("" if error is None else f" ± {times * error:.2f}")
