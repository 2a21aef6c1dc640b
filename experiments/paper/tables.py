"""The paper's tables: our numbers next to the paper's, as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from experiments.paper.collect import RunCollection
from experiments.paper.footnotes import table_notes
from experiments.paper.measures import MEASURES
from experiments.paper.suites import Column, Row, Table


class Cell(NamedTuple):
    """One of our numbers.

    Attributes:
        by_seed: values of the seeds whose run is finished and has one.
        diverged: number of diverged runs, with or without a value.
        decimals: to print.
        is_count: whether it is an integer in each run.
        seeds: number of seeds in the table.
    """

    by_seed: Mapping[int, float]
    diverged: int
    decimals: int
    is_count: bool = False
    seeds: int = 0

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
    """A table with its numbers.

    Attributes:
        table: its declaration.
        cells: our numbers, by row and column.
        paper: the paper's numbers, by row and column; `None` where it has none.
        notes: sentences of the footnote.
    """

    table: Table
    cells: list[list[Cell]]
    paper: list[list[float | None]]
    notes: list[str]


@cache
def paper_numbers() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """Return the paper's numbers, by table, row and column."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())


def fill_table(table: Table, collection: RunCollection) -> FilledTable:
    """Return a table with the numbers of the finished runs."""
    published = paper_numbers().get(table.name, {})
    specs = {spec for _, spec in table.labelled_specs()}
    seeds = sorted({seed for spec, seed in collection.runs if spec in specs})
    cells = [[_cell(row, column, collection, len(seeds)) for column in table.columns] for row in table.rows]
    paper = [[published.get(row.label, {}).get(column.header) for column in table.columns] for row in table.rows]
    return FilledTable(table, cells, paper, table_notes(table, collection, seeds))


def _cell(row: Row, column: Column, collection: RunCollection, seeds: int) -> Cell:
    spec = row.specs[column.group]
    measure = MEASURES[column.measure]
    values, diverged = {}, 0
    for seed in collection.seeds:
        if (run := collection.runs.get((spec, seed))) is None:
            continue
        baseline = row.specs.get("baseline") if measure.needs_baseline else None
        value = measure.compute(run, collection.runs.get((baseline, seed)) if baseline is not None else None)
        is_finite = value is None or math.isfinite(value)
        diverged += not is_finite or (spec, seed) in collection.diverged or (baseline, seed) in collection.diverged
        if value is not None and is_finite:
            values[seed] = value
    return Cell(values, diverged, measure.decimals, column.measure == "spikes", seeds)


def best_cells(filled: FilledTable, of_paper: bool) -> set[tuple[int, int]]:
    """Return row and column of the cells with the best value of their measure, in their column or row.

    Of our numbers, cells that lack a seed that another has are not compared: they may have the lucky seeds. No cell is
    best if more than half are equal to the best.
    """
    table = filled.table
    groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for r in range(len(table.rows)):
        for c, column in enumerate(table.columns):
            groups.setdefault((column.measure, r) if table.best_per_row else ("", c), []).append((r, c))
    best: set[tuple[int, int]] = set()
    for places in groups.values():
        better = MEASURES[table.columns[places[0][1]].measure].better
        values = _paper_values(filled, places) if of_paper else _comparable_means(filled, places)
        known = [value for value in values.values() if value is not None]
        if better and len(set(known)) > 1:
            top = min(known) if better == "low" else max(known)
            winners = {place for place, value in values.items() if value == top}
            best |= winners if of_paper or 2 * len(winners) <= len(known) else set()
    return best


def _paper_values(filled: FilledTable, places: list[tuple[int, int]]) -> dict[tuple[int, int], float | None]:
    return {(r, c): filled.paper[r][c] for r, c in places}


def _comparable_means(filled: FilledTable, places: list[tuple[int, int]]) -> dict[tuple[int, int], float | None]:
    """Return the means of cells; `None` for those with diverged runs or without a seed that another cell has."""
    cells = {(r, c): filled.cells[r][c] for r, c in places}
    seeds = {seed for cell in cells.values() for seed in cell.by_seed}
    return {place: None if cell.diverged or seeds - {*cell.by_seed} else cell.mean for place, cell in cells.items()}


def table_rows(filled: FilledTable, bold: str, escape: Callable[[str], str] = str) -> list[list[str]]:
    """Return header and rows as text. A column with the paper's numbers follows each column that has some.

    Args:
        filled: the table.
        bold: format of the best numbers, such as `**{}**`.
        escape: applied to all text, before `bold`.
    """
    table = filled.table
    has_paper = [any(row[c] is not None for row in filled.paper) for c in range(len(table.columns))]
    header = [table.row_header]
    for c, column in enumerate(table.columns):
        header += [column.header, "paper"] if has_paper[c] else [column.header]
    rows = [[escape(text) for text in header]]
    best, paper_best = best_cells(filled, of_paper=False), best_cells(filled, of_paper=True)
    for r, row in enumerate(table.rows):
        cells = [escape(row.label)]
        for c in range(len(table.columns)):
            text = escape(filled.cells[r][c].text)
            cells.append(bold.format(text) if (r, c) in best and text else text)
            if has_paper[c]:
                text = escape(_paper_text(filled, r, c))
                cells.append(bold.format(text) if (r, c) in paper_best and text else text)
        rows.append(cells)
    return rows


def _paper_text(filled: FilledTable, r: int, c: int) -> str:
    """Return a number of the paper with the decimals that its column has there; empty if there is none."""
    number = filled.paper[r][c]
    decimals = max(len(f"{row[c]:.6g}".partition(".")[2]) for row in filled.paper if row[c] is not None)
    return "" if number is None else f"{number:.{decimals}f}"


def title(filled: FilledTable) -> str:
    """Return a table's title."""
    name, subject = filled.table.name, filled.table.title
    if name.startswith("table"):
        return f"Table {name.removeprefix('table')}: {subject}"
    return subject[0].upper() + subject[1:]


def footnote(filled: FilledTable) -> str:
    """Return the paragraph below a table."""
    sentences = [note[0].upper() + note[1:] for note in filled.notes]
    return ". ".join(sentences) + "."


def markdown(filled: FilledTable) -> str:
    """Return a table in Markdown, with title and footnote."""
    header, *rows = table_rows(filled, "**{}**")
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    return f"### {title(filled)}\n\n" + "\n".join(lines) + f"\n\n{footnote(filled)}\n"


def latex(filled: FilledTable) -> str:
    """Return a table in LaTeX, for the package booktabs."""
    rows = table_rows(filled, "\\textbf{{{}}}", escape_latex)
    header, *lines = (" & ".join(cells) + " \\\\" for cells in rows)
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escape_latex(title(filled))}. {escape_latex(footnote(filled))}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
            "\\toprule",
            header,
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}\n",
        ]
    )


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "{}$&#_%"},
        "\\": "\\textbackslash{}",
        "^": "\\textasciicircum{}",
        "~": "\\textasciitilde{}",
        "±": "$\\pm$",
    }
)


def escape_latex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return text.translate(_LATEX)


def as_csv(filled: FilledTable) -> str:
    """Return a table as CSV: a line for each cell, with unrounded numbers."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(["table", "row", "column", "paper", "mean", "std", "runs", "diverged"])
    for row, cells, paper_row in zip(filled.table.rows, filled.cells, filled.paper, strict=True):
        for column, cell, paper in zip(filled.table.columns, cells, paper_row, strict=True):
            mean = float(np.mean(cell.values)) if cell.values else None
            numbers = [None if value is None else f"{value:.6g}" for value in (paper, mean, cell.deviation)]
            write.writerow([filled.table.name, row.label, column.header, *numbers, len(cell.values), cell.diverged])
    return out.getvalue()
