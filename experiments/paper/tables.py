"""Tables of the paper, our numbers beside the paper's, as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from experiments.paper.collect import Found
from experiments.paper.measures import DIVERGED_SAYS, MEASURES
from experiments.paper.suites import Column, Row, Table
from experiments.run.definitions import least_spike, recovery
from experiments.run.read import Run, corrupted_rows, corrupted_steps


class Cell(NamedTuple):
    """A number of ours.

    Attributes:
        by_seed: of the seeds whose run is done and has it.
        diverged: how many runs have diverged, those without a value included.
        decimals: to print.
        counts: whether it is a whole number in each run.
        seeds: how many there are in the table.
    """

    by_seed: Mapping[int, float]
    diverged: int
    decimals: int
    counts: bool = False
    seeds: int = 0

    @property
    def values(self) -> list[float]:
        """The numbers alone."""
        return list(self.by_seed.values())

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, as printed; `None` if there is no value."""
        return round(float(np.mean(self.values)), self.decimals) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (with n - 1); `None` for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def text(self, between: str = " ± ") -> str:
        """Return it as printed; empty if nothing was run. A count of one run is a whole number.

        Where it is of fewer seeds than the table has, it says so, and how many diverged where not all have.
        """
        if self.mean is None:
            some = f"{self.diverged} " if self.diverged < self.seeds else ""
            return f"{some}diverged" if self.diverged else ""
        whole = self.counts and len(self.values) == 1
        shown = f"{self.mean:.{0 if whole else self.decimals}f}"
        if self.deviation is not None:
            shown += f"{between}{self.deviation:.{self.decimals}f}"
        said = [f"{self.diverged} diverged"] if self.diverged else []
        if len(self.values) < self.seeds:
            said.append(f"{len(self.values)} of {self.seeds} seeds")
        return shown + (f" ({', '.join(said)})" if said else "")


class Filled(NamedTuple):
    """A table with its numbers.

    Attributes:
        table: of the catalogue.
        cells: ours, a row of the table each, a column of the table each.
        paper: the paper's, likewise; `None` where it has none.
        notes: sentences for the line below.
    """

    table: Table
    cells: list[list[Cell]]
    paper: list[list[float | None]]
    notes: list[str]


def paper_numbers() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """Return the paper's numbers, by table, row and column."""
    numbers: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    return numbers


def fill(table: Table, found: Found) -> Filled:
    """Return a table with the numbers of the runs that there are."""
    theirs = paper_numbers().get(table.name, {})
    seeds = _seeds(table, found)
    cells = [[_cell(row, column, found, len(seeds)) for column in table.columns] for row in table.rows]
    paper = [[theirs.get(row.label, {}).get(column.header) for column in table.columns] for row in table.rows]
    return Filled(table, cells, paper, _notes(table, found))


def _seeds(table: Table, found: Found) -> list[int]:
    """Return the seeds of which any run of a table is done."""
    settings = {setting for _, setting in table.labelled()}
    return sorted({seed for setting, seed in found.runs if setting in settings})


def _cell(row: Row, column: Column, found: Found, seeds: int) -> Cell:
    setting = row.settings[column.group]
    measure = MEASURES[column.measure]
    values, gone = {}, 0
    for seed in found.seeds:
        if (run := found.runs.get((setting, seed))) is None:
            continue
        other = row.settings.get("good") if measure.beside else None
        value = measure.of(run, found.runs.get((other, seed)) if other is not None else None)
        unfit = value is not None and not math.isfinite(value)
        gone += unfit or (setting, seed) in found.diverged or (other, seed) in found.diverged
        if value is not None and not unfit:
            values[seed] = value
    return Cell(values, gone, measure.decimals, column.measure == "spikes", seeds)


def _notes(table: Table, found: Found) -> list[str]:
    settings = {setting for _, setting in table.labelled()}
    used = [run for (setting, _), run in found.runs.items() if setting in settings]
    if not used:
        return ["no run of this table is done", *found.notes(table.labelled())]
    seeds = _seeds(table, found)
    notes = [about(used, seeds)]
    measures = dict.fromkeys(column.measure for column in table.columns)
    notes += [table.says, *(MEASURES[name].says for name in measures)]
    room = [least_spike(run.metrics["loss"], corrupted_rows(run)) for run in used] if "spikes" in measures else []
    if known := [each for each in room if np.isfinite(each)]:
        jump = float(np.median(known))
        notes.append(f"at the median step of these runs a loss has to jump by {jump:.2f} nats to be a spike")
    if {"hellaswag", "winogrande"} & set(measures):
        notes.append(_items(used))
    if any(key[0] in settings for key in found.diverged):
        notes.append(DIVERGED_SAYS)
    if "recovery" in measures and (disturbed := [run for run in used if corrupted_rows(run)]):
        most = recovery(np.full(len(disturbed[0].metrics["step"]), np.inf), np.zeros(1), corrupted_rows(disturbed[0]))
        notes.append(f"the most steps to recover that there can be are {most:.{MEASURES['recovery'].decimals}f}")
    if any(MEASURES[name].better for name in measures):
        notes.append("the best are in bold, whatever their error")
    if len(seeds) > 1:
        notes.append("± is the standard deviation over seeds")
    return [note for note in notes if note] + found.notes(table.labelled())


def about(runs: Sequence[Run], seeds: Sequence[int]) -> str:
    """Say what the runs have in common: scale, model, tokens, seeds, text, learning rate, bad batches, commit."""

    def said(values: Iterable[object]) -> str:
        return " and ".join(map(str, dict.fromkeys(values)))

    results = [run.result or {} for run in runs]
    bad = {(run.config["data"]["corruption"]["kind"], *corrupted_steps(run)) for run in runs if corrupted_steps(run)}
    times = {run.config["paper"]["lr_scale"] for run in runs}
    parts = [
        f"{said(run.config['paper']['scale'] for run in runs)} scale",
        f"model {said(run.config['model']['name'] for run in runs)} "
        f"({said(sorted({_short(result['parameters']) for result in results}))} parameters)",
        f"{said(sorted({_short(result['tokens']) for result in results}))} tokens",
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        f"text {said(run.config['data']['name'] for run in runs)} "
        f"(fingerprint {said(sorted({result['data_fingerprint'] for result in results}))})",
    ]
    rates = {float(run.config["paper"]["lr"]) for run in runs}
    if len(rates) == len(times) == 1:
        rate = rates.pop()
        parts.append(
            f"learning rate {rate:g} of the paper" + "".join(f", here {rate * each:g}" for each in times if each != 1)
        )
    else:
        parts += [f"learning rates {each:g} times the paper's, which are named" for each in sorted(times) if each != 1]
    parts += [
        f"bad batches of kind {kind} put in at steps {', '.join(map(str, steps))}" for kind, *steps in sorted(bad)
    ]
    if bad and any(not corrupted_steps(run) for run in runs):
        parts.append("none in the undisturbed runs")
    starts = [start for run in runs for start in run.starts]
    windows = {run.config["clip"].get("recovery_window") for run in runs} - {None}
    recovering = sum(run.config["clip"].get("recovery_window") is not None for run in runs)
    parts += [
        f"ZClip with recovery (the library's default; the paper has none) in windows of {each} steps"
        + (f" in {recovering} of the {len(runs)} runs" if recovering < len(runs) else "")
        for each in sorted(map(str, windows))
    ]
    commits = sorted({str(start.get("commit"))[:8] for start in starts}) or ["not known"]
    changed = any(start.get("uncommitted_changes") for start in starts)
    parts.append(f"commit {said(commits)}" + (" with changes" if changed else ""))
    return ", ".join(parts)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _items(runs: Sequence[Run]) -> str:
    """Say on how many items the scores are."""
    counts = {
        title: sorted({score["items"] for run in runs if (score := run.score(title.lower())) is not None})
        for title in ("HellaSwag", "WinoGrande")
    }
    said = [f"{title} on {' or '.join(f'{count:,}' for count in found)}" for title, found in counts.items() if found]
    cut = max((score.get("truncated_fraction") or 0.0 for run in runs for score in run.scores), default=0.0)
    shortened = f"; up to {cut:.0%} of the texts are longer than the model sees, and cut" if cut >= 0.005 else ""
    errors = [
        100 * error
        for run in runs
        for task, metric in (("hellaswag", "acc_norm"), ("winogrande", "acc"))
        if (score := run.score(task)) is not None and (error := score.get(f"{metric}_stderr")) is not None
    ]
    chance = f"; their standard error is up to {max(errors):.1f}, and chance 25 and 50" if errors else ""
    return f"items: {', '.join(said)}{chance}{shortened}" if said else "the tasks were not scored"


def best(filled: Filled, of_paper: bool) -> set[tuple[int, int]]:
    """Return which cells hold the best of their measure, in their column, or across the columns of their row.

    Of ours, one that lacks a seed that another has is not compared: its own may be the lucky ones; and where more than
    half are equal to the best, none is.
    """
    table = filled.table
    groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for r in range(len(table.rows)):
        for c, column in enumerate(table.columns):
            groups.setdefault((column.measure, r) if table.across else ("", c), []).append((r, c))
    found: set[tuple[int, int]] = set()
    for places in groups.values():
        better = MEASURES[table.columns[places[0][1]].measure].better
        seeds = {seed for r, c in places for seed in filled.cells[r][c].by_seed}
        ours = {
            (r, c): None if (cell := filled.cells[r][c]).diverged or seeds - {*cell.by_seed} else cell.mean
            for r, c in places
        }
        values = {(r, c): filled.paper[r][c] for r, c in places} if of_paper else ours
        known = [value for value in values.values() if value is not None]
        if better and len(set(known)) > 1:
            top = min(known) if better == "low" else max(known)
            winners = {place for place, value in values.items() if value == top}
            found |= winners if of_paper or 2 * len(winners) <= len(known) else set()
    return found


def grid(filled: Filled, bold: str, between: str) -> list[list[str]]:
    """Return headers and rows: behind each column that the paper has numbers of, a column with them.

    Args:
        filled: the table.
        bold: what a best number becomes, with {} for it.
        between: mean and standard deviation.
    """
    table = filled.table
    has = [any(row[c] is not None for row in filled.paper) for c in range(len(table.columns))]
    header = [table.stub]
    for c, column in enumerate(table.columns):
        header += [column.header, "paper"] if has[c] else [column.header]
    rows = [header]
    top, paper_top = best(filled, of_paper=False), best(filled, of_paper=True)
    for r, row in enumerate(table.rows):
        cells = [row.label]
        for c in range(len(table.columns)):
            text = filled.cells[r][c].text(between)
            cells.append(bold.format(text) if (r, c) in top and text else text)
            if has[c]:
                number = filled.paper[r][c]
                text = "" if number is None else _paper_text(number, filled, c)
                cells.append(bold.format(text) if (r, c) in paper_top and text else text)
        rows.append(cells)
    return rows


def _paper_text(number: float, filled: Filled, c: int) -> str:
    """Return a number of the paper's with the decimals that the paper gives its column."""
    decimals = max(len(f"{row[c]:.6g}".partition(".")[2]) for row in filled.paper if row[c] is not None)
    return f"{number:.{decimals}f}"


def title(filled: Filled) -> str:
    """Return a table's title."""
    name = filled.table.name
    number = f"Table {name.removeprefix('table')}: " if name.startswith("table") else ""
    return number + filled.table.title if number else filled.table.title[0].upper() + filled.table.title[1:]


def below(filled: Filled) -> str:
    """Return the line below a table."""
    sentences = [note[0].upper() + note[1:] for note in filled.notes]
    return ". ".join(sentences) + "."


def markdown(filled: Filled) -> str:
    """Return a table in Markdown, with its title and the line below."""
    header, *rows = grid(filled, "**{}**", " ± ")
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    return f"### {title(filled)}\n\n" + "\n".join(lines) + f"\n\n{below(filled)}\n"


def latex(filled: Filled) -> str:
    """Return a table in LaTeX, for the package booktabs."""
    header, *rows = grid(filled, "\\textbf{{{}}}", " $\\pm$ ")
    lines = [" & ".join(_escaped(cell) for cell in cells) + " \\\\" for cells in (header, *rows)]
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_escaped(title(filled))}. {_escaped(below(filled))}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n\\toprule\n"
        f"{lines[0]}\n\\midrule\n" + "\n".join(lines[1:]) + "\n\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def _escaped(text: str) -> str:
    for character in "%_&#":
        text = text.replace(character, f"\\{character}")
    return text.replace("±", "$\\pm$")


def as_csv(filled: Filled) -> str:
    """Return a table as CSV: a line for each cell, with the numbers themselves."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(["table", "row", "column", "paper", "mean", "std", "runs", "diverged"])
    for row, cells, theirs in zip(filled.table.rows, filled.cells, filled.paper, strict=True):
        for column, cell, paper in zip(filled.table.columns, cells, theirs, strict=True):
            mean = float(np.mean(cell.values)) if cell.values else None
            numbers = [None if value is None else f"{value:.6g}" for value in (paper, mean, cell.deviation)]
            write.writerow([filled.table.name, row.label, column.header, *numbers, len(cell.values), cell.diverged])
    return out.getvalue()
