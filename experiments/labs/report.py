"""What the reports of all labs share: their parts in Markdown, their numbers, and the sentences on outcomes."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.escape import escaped_list
from experiments.labs.declaration import Lab
from experiments.labs.statistics import Comparison, interval
from experiments.labs.statistics import __doc__ as how_compared
from experiments.run.collect import RunCollection, seeds_text
from experiments.run.read import Run


class LabReport(NamedTuple):
    """What is written for a lab.

    Attributes:
        text: the report in Markdown, which shows each figure as NAME.png.
        numbers: the numbers of each run as CSV.
        figures: by name.
    """

    text: str
    numbers: str
    figures: Mapping[str, Figure]


def lab_text(
    lab: Lab,
    collection: RunCollection,
    findings: Sequence[str],
    sections: Mapping[str, str],
    figures: Sequence[str],
    made: str,
    with_diverged: bool = True,
) -> str:
    """Return the report of a lab.

    Args:
        lab: the lab.
        collection: its runs.
        findings: sentences.
        sections: Markdown by heading, in order.
        figures: names.
        made: sentence on when it was made.
        with_diverged: whether it names runs that end far above their lowest loss.
    """
    parts = [
        f"# Lab: {lab.title}",
        f"{len(collection.runs)} runs are finished, {seeds_text(collection.seeds)}. {made}",
        "## Findings",
        escaped_list(findings),
    ]
    for heading, content in sections.items():
        parts += [f"## {heading}", content]
    parts += ["## Figures", *(f"![{name}]({name}.png)" for name in figures)]
    parts += ["## Method", " ".join((how_compared or "").split())]
    command = ["python", "train.py", "-m", f"experiment={lab.name}_lab", f"seed={','.join(map(str, collection.seeds))}"]
    parts += [f"`{' '.join(command)}` makes the runs. {_made_by([*collection.runs.values()])}"]
    if notes := [*collection.warnings, *collection.notes([(run.label, run) for run in lab.runs], with_diverged)]:
        parts += ["## Missing runs", escaped_list(notes)]
    return "\n\n".join(parts) + "\n"


def _made_by(runs: Sequence[Run]) -> str:
    """Return a sentence on the machines, the versions of torch and the commits of runs, with numbers of runs."""
    starts = [run.environment for run in runs]
    machines = Counter(f"{start.get('device', 'an unknown device')} with torch {_torch(start)}" for start in starts)
    commits = Counter(str(start.get("commit") or "unknown")[:8] for start in starts)
    listed = (", ".join(f"{name} ({count})" for name, count in found.most_common()) for found in (machines, commits))
    return "They were made on {}, at the commits {}.".format(*listed)


def _torch(start: Mapping[str, Any]) -> str:
    return str((start.get("versions") or {}).get("torch", "unknown"))


def outcome_sentences(comparisons: Mapping[str, Comparison], texts: Mapping[str, str]) -> list[str]:
    """Return a sentence for each outcome that some arm has: its text, and the arms with their numbers."""
    said = []
    for outcome, text in texts.items():
        names = [f"{label} {each.text()}" for label, each in comparisons.items() if each.outcome == outcome]
        if names:
            said.append(f"{text}: {', '.join(names)}.")
    return said


def arm_cell(label: str, is_control: bool) -> str:
    """Return how a table names an arm."""
    return label + (" (control)" if is_control else "")


def comparison_cells(comparison: Comparison | None) -> tuple[str, str]:
    """Return the comparison of an arm with the reference arm, and its outcome, as text; empty without one."""
    return ("", "") if comparison is None else (comparison.text(), comparison.outcome)


def mean_text(values: Sequence[float], decimals: int) -> str:
    """Return a mean with half the width of its 95 % confidence interval."""
    mean = float(np.mean(values))
    low, high = interval(values)
    return f"{mean:.{decimals}f}" + ("" if math.isnan(low) else f" ± {(high - low) / 2:.{decimals}f}")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV. Floats have six digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return out.getvalue()
