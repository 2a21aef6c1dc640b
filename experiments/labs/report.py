"""The report of a lab in Markdown: what was asked, what was found, tables, figures and the runs."""

from collections.abc import Sequence

import numpy as np

from experiments.escape import escape_markdown
from experiments.labs.declaration import Lab
from experiments.labs.statistics import CURES, HARMS, HELPS, SAME, UNDECIDED
from experiments.labs.statistics import __doc__ as how_compared
from experiments.labs.tables import (
    HEADER,
    WARNING_HEADER,
    ArmResult,
    markdown_table,
    ratio_text,
    table_rows,
    warning_rows,
)
from experiments.run.collect import RunCollection, seeds_text

#: What the outcomes say of the area of spikes that the reference arm has.
SENTENCES = {
    CURES: "Less than a tenth of it is left with",
    HELPS: "Less than half of it is left with",
    SAME: "Between half and twice of it is left with",
    HARMS: "There is more than twice as much with",
    UNDECIDED: "These seeds do not decide about",
}


def report(lab: Lab, results: Sequence[ArmResult], collection: RunCollection, figures: Sequence[str], made: str) -> str:
    """Return the report; `figures` are the names of PNG files beside it, and `made` says when it was made."""
    reference = collection.runs_of(lab.arm(lab.reference))
    parts = [
        f"# Lab: {lab.title}",
        f"{len(collection.runs)} runs are finished, {seeds_text(collection.seeds)}. {made}",
        "## Findings",
        "\n".join(f"- {sentence}" for sentence in findings(lab, results)),
        "## Arms",
        markdown_table(HEADER, table_rows(results)),
        " ".join((how_compared or "").split()),
    ]
    if rows := warning_rows(reference):
        parts += ["## Warnings", markdown_table(WARNING_HEADER, rows)]
    parts += ["## Figures", *(f"![{name}]({name}.png)" for name in figures)]
    notes = [*collection.warnings, *collection.notes([(arm.label, arm) for arm in lab.arms])]
    if notes:
        parts += ["## Missing runs", "\n".join(f"- {escape_markdown(note)}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def findings(lab: Lab, results: Sequence[ArmResult]) -> list[str]:
    """Return a sentence for each outcome with the arms that have it, and one on the controls that must cure."""
    said = []
    area = [each.area for result in results if result.arm.label == lab.reference for each in result.numbers.values()]
    if area:
        said.append(f"With {lab.reference}, the area of spikes is {np.mean(area):.0f} nats x steps in a run.")
    for outcome, text in SENTENCES.items():
        arms = [result for result in results if result.outcome == outcome]
        if arms:
            names = ", ".join(f"{r.arm.label} {ratio_text(r.ratio)}" for r in arms if r.ratio is not None)
            said.append(f"{text}: {names}.")
    compared = {result.arm.label: result.outcome for result in results if result.outcome}
    missing = [label for label in lab.cures if label in compared and compared[label] != CURES]
    if missing:
        said.append(f"The explanation is in doubt: {', '.join(missing)} must cure, and it is not shown.")
    elif all(label in compared for label in lab.cures):
        said.append(f"The controls that must cure do: {', '.join(lab.cures)}.")
    return said
