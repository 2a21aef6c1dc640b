"""The report of a lab on spikes: what its arms do to them, and what warns before them."""

from collections.abc import Sequence

import numpy as np

from experiments.escape import escaped_table
from experiments.labs.declaration import SpikeLab
from experiments.labs.report import LabReport, lab_text, outcome_sentences
from experiments.labs.rule_figure import draw_rule, rule_example
from experiments.labs.spike_figures import draw_areas, draw_losses, draw_spike, first_spike
from experiments.labs.spike_numbers import EXCESS_ABOVE
from experiments.labs.spike_tables import (
    HEADER,
    WARNING_HEADER,
    ArmResult,
    arm_results,
    csv_table,
    table_rows,
    warning_rows,
)
from experiments.labs.statistics import CURES, EQUIVALENT, HARMS, HELPS, UNDECIDED
from experiments.run.collect import RunCollection

#: What the outcomes say of the area of spikes that the reference arm has.
SENTENCES = {
    CURES: "Less than a tenth of it is left with",
    HELPS: "Less than half of it is left with",
    EQUIVALENT: "Between half and twice of it is left with",
    HARMS: "There is more than twice as much with",
    UNDECIDED: "These seeds do not decide about",
}
#: What the column of excesses is.
EXCESS = (
    f"The excess is the loss minus its level, over all steps at more than {EXCESS_ABOVE} times the level. So it also "
    "counts bumps that are too low for a spike. It was chosen after the first runs, so it has no outcome."
)


def spike_report(lab: SpikeLab, collection: RunCollection, made: str) -> LabReport:
    """Return the report, the numbers and the figures of a lab; `made` says when the report was made."""
    results = arm_results(lab, collection)
    reference = collection.runs_of(lab.arm(lab.reference))
    figures = {"areas": draw_areas(lab, results), "losses": draw_losses(lab, results, collection)}
    sections = {"Arms": f"{escaped_table(HEADER, table_rows(results))}\n\n{EXCESS}"}
    if (found := first_spike(reference)) is not None:
        figures["spike"] = draw_spike(*found)
    if lab.example is not None and (pair := rule_example(lab, collection)) is not None:
        figures["rule"] = draw_rule(*pair, (lab.reference, lab.example))
    if rows := warning_rows(reference):
        sections["Warnings"] = escaped_table(WARNING_HEADER, rows)
    text = lab_text(lab, collection, findings(lab, results), sections, [*figures], made)
    return LabReport(text, csv_table(results), figures)


def findings(lab: SpikeLab, results: Sequence[ArmResult]) -> list[str]:
    """Return a sentence for each outcome with the arms that have it, and one on the controls that must cure."""
    said = []
    area = [each.area for result in results if result.arm.label == lab.reference for each in result.numbers.values()]
    if area:
        said.append(f"With {lab.reference}, the area of spikes is {np.mean(area):.0f} nats x steps in a run.")
    ratios = {result.arm.label: result.ratio for result in results if result.ratio is not None}
    if area and not max(area):
        said.append("There is nothing to prevent: these runs do not show the instability.")
        ratios = {label: ratio for label, ratio in ratios.items() if ratio.outcome == HARMS}
    said += outcome_sentences(ratios, SENTENCES) + costs(lab, results)
    for label in (label for label in lab.cures if label in ratios):
        cures = ratios[label].outcome == CURES
        said.append(
            f"{label} must cure if the explanation holds, and "
            + ("does, which does not contradict it." if cures else "this is not shown: the explanation is in doubt.")
        )
    return said


def costs(lab: SpikeLab, results: Sequence[ArmResult]) -> list[str]:
    """Return a sentence on each arm with less area of spikes whose mean loss is above the reference's all the same."""
    losses = {r.arm.label: {seed: each.mean_loss for seed, each in r.numbers.items()} for r in results}
    reference = losses.get(lab.reference, {})
    said = []
    spared = [each.arm.label for each in results if each.ratio is not None and each.ratio.outcome in (CURES, HELPS)]
    for label in spared:
        seeds = losses[label].keys() & reference.keys()
        own, other = (float(np.mean([by_seed[seed] for seed in seeds])) for by_seed in (losses[label], reference))
        if own > other:
            said.append(
                f"{label} learns less all the same: its mean loss is {own:.3g}, and {other:.3g} with {lab.reference}."
            )
    return said
