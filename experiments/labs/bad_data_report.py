"""The report of a lab on bad batches: what they cost with each arm, by kind, and whether the arm recognises them."""

from collections.abc import Sequence

import numpy as np

from experiments.escape import escaped_table
from experiments.labs.bad_data import SMALLEST_COST, SMALLEST_EXCESS, BadDataResult, bad_data_results
from experiments.labs.bad_data_figures import draw_after, draw_excess, draw_kinds
from experiments.labs.declaration import BadDataLab
from experiments.labs.report import (
    LabReport,
    arm_cell,
    comparison_cells,
    csv_text,
    lab_text,
    mean_text,
    outcome_sentences,
)
from experiments.labs.statistics import EQUIVALENT, LOWERS, RAISES, UNDECIDED
from experiments.run.collect import RunCollection

HEADER = (
    "arm",
    "excess loss (nats)",
    "cost of skipping",
    "minus the reference (95 %)",
    "outcome",
    "area (nats x steps)",
    "test loss, difference",
    "cost without bad batches (95 %)",
    "outcome of the cost",
    "bad batches recognised %",
    "acts without bad batches %",
    "seeds",
)
#: What the outcomes say of the excess loss of the reference arm.
SENTENCES = {
    LOWERS: f"Lower by more than {SMALLEST_EXCESS:g} nats with",
    EQUIVALENT: f"Within {SMALLEST_EXCESS:g} nats of it with",
    RAISES: f"Higher by more than {SMALLEST_EXCESS:g} nats with",
    UNDECIDED: "These seeds do not decide about",
}
#: What the outcomes say of the test loss of the reference arm without bad batches.
COST_SENTENCES = {
    LOWERS: f"Without bad batches, the test loss is lower by more than {SMALLEST_COST:g} nats with",
    EQUIVALENT: f"Without bad batches, the test loss is within {SMALLEST_COST:g} nats with",
    RAISES: f"Without bad batches, the test loss is higher by more than {SMALLEST_COST:g} nats with",
    UNDECIDED: "These seeds do not decide what is the cost without bad batches of",
}
#: What the columns mean.
LEGEND = (
    "Losses are differences from the run of the same arm and seed without bad batches. The excess loss is their mean "
    "over the 10 steps after a bad batch. The cost of skipping is the excess loss of a run that skips exactly the bad "
    "batches, because it learns from fewer. It is estimated from the slope of the loss. The area is the sum of the "
    "differences over all steps without bad batches. The cost is the test loss of the arm without bad batches, minus "
    "that of the reference arm. An arm recognises a bad batch if it clips or skips the step, lowers the learning rate, "
    "or masks sequences. The rise by kind is the excess loss minus the mean over the 5 steps before the bad batch: "
    "what earlier ones have left does not count."
)


def bad_data_report(lab: BadDataLab, collection: RunCollection, made: str) -> LabReport:
    """Return the report, the numbers and the figures of a lab; `made` says when the report was made."""
    results = bad_data_results(lab, collection)
    kinds = sorted({kind for result in results for each in result.numbers.values() for kind in each.rise_of})
    sections = {
        "Arms": f"{escaped_table(HEADER, [table_row(result) for result in results])}\n\n{LEGEND}",
        "Rise of the loss by kind of bad batch (nats)": escaped_table(
            ("arm", *kinds), [[_name(r), *(f"{r.mean_rise(kind):.3f}" for kind in kinds)] for r in results]
        ),
    }
    figures = {}
    if results:
        figures = {
            "excess": draw_excess(lab, results),
            "kinds": draw_kinds(results, kinds),
            "after": draw_after(lab, results, collection, kinds),
        }
    text = lab_text(lab, collection, findings(lab, results), sections, [*figures], made)
    return LabReport(text, csv_table(results, kinds), figures)


def findings(lab: BadDataLab, results: Sequence[BadDataResult]) -> list[str]:
    """Return sentences on the excess loss of the reference arm, and on the others against it."""
    if not results:
        return ["No arm has a run of a seed with bad batches, and one without them."]
    said = []
    for result in (result for result in results if result.arm.label == lab.reference):
        excess = float(np.mean([each.excess for each in result.numbers.values()]))
        said.append(f"With {lab.reference}, the excess loss after bad batches is {excess:.3f} nats.")
    skipping = [each.skip_cost for result in results for each in result.numbers.values()]
    said.append(f"A run that skips exactly the bad batches would have {float(np.mean(skipping)):.3f} nats (estimated).")
    changes = {result.arm.label: result.comparison for result in results if result.comparison is not None}
    costs = {result.arm.label: result.cost for result in results if result.cost is not None}
    return [*said, *outcome_sentences(changes, SENTENCES), *outcome_sentences(costs, COST_SENTENCES)]


def table_row(result: BadDataResult) -> list[str]:
    """Return the row of an arm as text."""
    numbers = result.numbers.values()
    return [
        _name(result),
        mean_text([each.excess for each in numbers], 3),
        mean_text([each.skip_cost for each in numbers], 3),
        *comparison_cells(result.comparison),
        mean_text([each.area for each in numbers], 1),
        mean_text([each.final for each in numbers], 3),
        *comparison_cells(result.cost),
        f"{100 * float(np.mean([each.recognised for each in numbers])):.0f}",
        f"{100 * float(np.mean([each.acted for each in numbers])):.1f}",
        str(len(numbers)),
    ]


def _name(result: BadDataResult) -> str:
    return arm_cell(result.arm.label, result.arm.is_control)


def csv_table(results: Sequence[BadDataResult], kinds: Sequence[str]) -> str:
    """Return the numbers of each run as CSV: a row for each arm and seed."""
    fields = ("excess", "skip_cost", "area", "final", "cost", "recognised", "acted")
    rows = []
    for result in results:
        for seed, numbers in result.numbers.items():
            values = [getattr(numbers, field) for field in fields] + [numbers.rise_of.get(k, np.nan) for k in kinds]
            rows.append([result.arm.label, " ".join(result.arm.overrides), seed, *values])
    return csv_text(["arm", "overrides", "seed", *fields, *(f"rise_{kind}" for kind in kinds)], rows)
