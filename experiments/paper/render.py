"""Tables with our numbers next to the paper's, as Markdown, LaTeX and CSV; tables_and_figures.py declares them."""

import csv
import io
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from common.text import markdown_table
from experiments.escape import escape_latex, escape_markdown, escaped_list
from experiments.paper.footnotes import table_notes
from experiments.paper.measures import MEASURES, guessed_measures
from experiments.paper.tables_and_figures import Column, Specs, Table
from experiments.run.collect import RunCollection


class Cell(NamedTuple):
    """A number of ours, and the paper's."""

    by_seed: Mapping[int, float]  # values of the seeds whose run is finished and has one
    diverged: int  # number of diverged runs, with or without a value
    decimals: int  # to print
    is_count: bool  # whether it is an integer in each run
    seeds: int  # number of seeds in the table
    paper: float | None  # the paper's number, if it has one

    @property
    def values(self) -> list[float]:
        """The values of all seeds."""
        return list(self.by_seed.values())

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, rounded as printed; `None` if there is no value."""
        return round(float(np.mean(self.values)), self.decimals) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (with n - 1); `None` for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """The cell as printed; empty if nothing was run.

        It names the number of diverged runs, and of seeds if other cells of the table have more. A count of a single
        run is printed as an integer.
        """
        if self.mean is None:
            count = f"{self.diverged} " if self.diverged < self.seeds else ""
            return f"{count}diverged" if self.diverged else ""
        is_integer = self.is_count and len(self.values) == 1
        text = f"{self.mean:.{0 if is_integer else self.decimals}f}"
        if self.deviation is not None:
            text += f" ± {self.deviation:.{self.decimals}f}"
        notes = [f"{self.diverged} diverged"] if self.diverged else []
        if len(self.values) < self.seeds:
            notes.append(f"{len(self.values)} of {self.seeds} seeds")
        return text + (f" ({', '.join(notes)})" if notes else "")


class FilledTable(NamedTuple):
    """A table with its numbers, by row and column, and the sentences of its footnote."""

    table: Table
    cells: list[list[Cell]]
    notes: list[str]
    not_compared: frozenset[str] = frozenset()  # measures of which no number of ours is the best


@cache
def paper_numbers() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """Return the paper's numbers, by table, row and column."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())


def fill_table(table: Table, collection: RunCollection) -> FilledTable:
    """Return a table with the numbers of the finished runs."""
    specs = {spec for _, spec in table.labelled_specs()}
    seeds = sorted({seed for spec, seed in collection.runs if spec in specs})
    cells = []
    for label, row in table.rows.items():
        paper = paper_numbers().get(table.name, {}).get(label, {})
        cells.append([_cell(row, column, collection, len(seeds), paper.get(column.header)) for column in table.columns])
    runs = [run for (spec, _), run in collection.runs.items() if spec in specs]
    return FilledTable(table, cells, table_notes(table, collection, seeds), guessed_measures(runs))


def _cell(row: Specs, column: Column, collection: RunCollection, seeds: int, paper: float | None) -> Cell:
    spec, measure = row[column.group], MEASURES[column.measure]
    baseline = row.get("baseline") if measure.needs_baseline else None
    values, diverged = {}, 0
    for seed in collection.seeds:
        if (run := collection.runs.get((spec, seed))) is None:
            continue
        value = measure.compute(run, collection.runs.get((baseline, seed)) if baseline is not None else None)
        is_finite = value is None or math.isfinite(value)
        diverged += not is_finite or (spec, seed) in collection.diverged or (baseline, seed) in collection.diverged
        if value is not None and is_finite:
            values[seed] = value
    return Cell(values, diverged, measure.decimals, column.measure == "spikes", seeds, paper)


def _best_cells(filled: FilledTable, of_paper: bool) -> set[tuple[int, int]]:
    """Return row and column of the cells with the best value of their measure, in their column or row.

    Of our numbers, those with diverged runs and those that lack a seed that another has are not compared: they may have
    the lucky seeds. No cell of ours is best if more than half are equal to the best, or if its measure is not compared.
    """
    groups: dict[tuple[str, int], dict[tuple[int, int], Cell]] = {}
    for r, row in enumerate(filled.cells):
        for c, (column, cell) in enumerate(zip(filled.table.columns, row, strict=True)):
            group = (column.measure, r if filled.table.best_per_row else c)
            groups.setdefault(group, {})[r, c] = cell
    best: set[tuple[int, int]] = set()
    for (measure, _), cells in groups.items():
        seeds = {seed for cell in cells.values() for seed in cell.by_seed}
        if of_paper:
            values = {place: cell.paper for place, cell in cells.items()}
        else:
            values = {
                place: None if cell.diverged or seeds - {*cell.by_seed} else cell.mean for place, cell in cells.items()
            }
        known = [value for value in values.values() if value is not None]
        if (better := MEASURES[measure].better) and len(set(known)) > 1:
            top = min(known) if better == "low" else max(known)
            winners = {place for place, value in values.items() if value == top}
            if not of_paper and measure in filled.not_compared:
                continue
            best |= winners if of_paper or 2 * len(winners) <= len(known) else set()
    return best


def table_rows(filled: FilledTable, bold: str, escape: Callable[[str], str] = str) -> list[list[str]]:
    """Return header and rows as text. A column with the paper's numbers follows each column that has some.

    All text is escaped. Then `bold`, such as `**{}**`, formats the best numbers.
    """
    columns = [[escape(text) for text in (filled.table.row_header, *filled.table.rows)]]
    best, paper_best = _best_cells(filled, of_paper=False), _best_cells(filled, of_paper=True)

    def add_column(header: str, texts: list[str], best_places: set[tuple[int, int]], c: int) -> None:
        column = [escape(header)]
        for r, text in enumerate(map(escape, texts)):
            column.append(bold.format(text) if (r, c) in best_places and text else text)
        columns.append(column)

    for c, column in enumerate(filled.table.columns):
        add_column(column.header, [row[c].text for row in filled.cells], best, c)
        papers = [row[c].paper for row in filled.cells]
        if known := [number for number in papers if number is not None]:
            decimals = max(len(f"{number:.6g}".partition(".")[2]) for number in known)
            texts = ["" if number is None else f"{number:.{decimals}f}" for number in papers]
            add_column("paper", texts, paper_best, c)
    return [list(row) for row in zip(*columns, strict=True)]


def title(filled: FilledTable) -> str:
    """Return a table's title."""
    name, subject = filled.table.name, filled.table.title
    if name.startswith("table"):
        return f"Table {name.removeprefix('table')}: {subject}"
    return subject[0].upper() + subject[1:]


def footnotes(filled: FilledTable) -> list[str]:
    """Return the notes below a table as sentences."""
    return [f"{note[0].upper()}{note[1:]}." for note in filled.notes]


def markdown(filled: FilledTable) -> str:
    """Return a table in Markdown, with its title, and its footnotes as a list."""
    header, *rows = table_rows(filled, "**{}**", escape_markdown)
    below = f"{escaped_list(notes)}\n" if (notes := footnotes(filled)) else ""
    return f"### {escape_markdown(title(filled))}\n\n{markdown_table(header, rows)}\n\n{below}"


def latex(filled: FilledTable) -> str:
    """Return a table in LaTeX, for the package booktabs."""
    rows = table_rows(filled, "\\textbf{{{}}}", escape_latex)
    header, *lines = (" & ".join(cells) + " \\\\" for cells in rows)
    body = "\n".join(lines)
    return rf"""\begin{{table}}
\centering
\caption{{{escape_latex(title(filled))}. {escape_latex(" ".join(footnotes(filled)))}}}
\begin{{tabular}}{{l{"r" * (len(rows[0]) - 1)}}}
\toprule
{header}
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table}}
"""


def as_csv(filled: FilledTable) -> str:
    """Return a table as CSV: a line for each cell, with unrounded numbers."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(["table", "row", "column", "paper", "mean", "std", "runs", "diverged"])
    for label, cells in zip(filled.table.rows, filled.cells, strict=True):
        for column, cell in zip(filled.table.columns, cells, strict=True):
            mean = float(np.mean(cell.values)) if cell.values else None
            numbers = [None if value is None else f"{value:.6g}" for value in (cell.paper, mean, cell.deviation)]
            write.writerow([filled.table.name, label, column.header, *numbers, len(cell.values), cell.diverged])
    return out.getvalue()
