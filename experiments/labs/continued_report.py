"""The report of a lab on changes in the middle of a run: what each arm costs, and how a rule releases the rate."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.escape import escaped_table
from experiments.labs.continued import (
    EARLY,
    OPEN,
    REFUTED,
    RETURNED,
    SCALE_STEPS,
    SMALLEST_COST,
    SUPPORTED,
    ContinuedResult,
    compared_arms,
    continued_results,
    judge_brake,
)
from experiments.labs.continued_figure import draw_forks
from experiments.labs.declaration import ContinuedLab
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
    "mean loss (nats)",
    "minus the reference (95 %)",
    "outcome",
    f"first {EARLY} steps (nats)",
    "acts in % of steps",
    *(f"scale after {steps:,}" for steps in SCALE_STEPS),
    "lowest scale",
    f"steps to {RETURNED:g}",
    "seeds",
)
#: What the outcomes say of the mean loss of the reference arm.
SENTENCES = {
    LOWERS: f"lower by more than {SMALLEST_COST:g} nats with",
    EQUIVALENT: f"within {SMALLEST_COST:g} nats of it with",
    RAISES: f"higher by more than {SMALLEST_COST:g} nats with",
    UNDECIDED: "not decided by these seeds with",
}
#: What is said of the claim on the brake.
VERDICTS = {
    SUPPORTED: "is supported: neither with new text nor with a longer context is the cost larger.",
    REFUTED: "is refuted.",
    OPEN: "is not decided by these runs.",
}
#: What the columns mean.
LEGEND = (
    "The mean loss is that of all steps after the fork. An arm acts if it clips or skips the step, or lowers the rate "
    f"further. The rate has returned when its scale is above {RETURNED:g} for good: 0 steps if it never left, and "
    "`not` for seeds where it has not at the end. Numbers are means over seeds, and the steps are medians."
)


def continued_report(lab: ContinuedLab, collection: RunCollection, made: str) -> LabReport:
    """Return the report, the numbers and the figure of a lab; `made` says when the report was made."""
    results = continued_results(lab, collection)
    sections = {
        _heading(name): escaped_table(HEADER, [table_row(result) for result in results[name]])
        for name in results
        if results[name]
    }
    sections["Columns"] = LEGEND
    figure = draw_forks(lab, collection)
    figures = {} if figure is None else {"forks": figure}
    text = lab_text(  # new text has a higher loss: that is no divergence
        lab, collection, findings(lab, results), sections, [*figures], made, with_diverged=False
    )
    return LabReport(text, csv_table(lab, results), figures)


def findings(lab: ContinuedLab, results: Mapping[str, Sequence[ContinuedResult]]) -> list[str]:
    """Return a sentence on the claim about the brake, and those on the outcomes of each change."""
    claim = f"The claim that the brake costs at most {SMALLEST_COST:g} nats where norms rise for a good reason"
    said = [f"{claim} {VERDICTS[judge_brake(lab, results)]}"]
    for name, arms in results.items():
        changes = {result.label: result.comparison for result in arms if result.comparison is not None}
        texts = {outcome: f"{_heading(name)}: the mean loss is {text}" for outcome, text in SENTENCES.items()}
        said += outcome_sentences(changes, texts)
    return said


def table_row(result: ContinuedResult) -> list[str]:
    """Return the row of an arm as text."""
    numbers = [*result.numbers.values()]
    return [
        arm_cell(result.label, result.is_control),
        mean_text([each.loss for each in numbers], 4),
        *comparison_cells(result.comparison),
        mean_text([each.early for each in numbers], 4),
        f"{100 * float(np.mean([each.acted for each in numbers])):.1f}",
        *(_scale_text([each.scales[index] for each in numbers]) for index in range(len(SCALE_STEPS))),
        _scale_text([each.lowest for each in numbers]),
        _steps_text([each.returned for each in numbers]),
        str(len(numbers)),
    ]


def csv_table(lab: ContinuedLab, results: Mapping[str, Sequence[ContinuedResult]]) -> str:
    """Return the numbers of each run as CSV: a row for each change, arm and seed."""
    fields = ("loss", "early", "acted", "lowest", "returned")
    scales = [f"scale_{steps}" for steps in SCALE_STEPS]
    rows = []
    for name, arms in compared_arms(lab).items():
        for result in results[name]:
            for seed, numbers in result.numbers.items():
                values = [*(getattr(numbers, field) for field in fields), *numbers.scales]
                rows.append([name, result.label, " ".join(arms[result.label].overrides), seed, *values])
    return csv_text(["change", "arm", "overrides", "seed", *fields, *scales], rows)


def _heading(name: str) -> str:
    return name[:1].upper() + name[1:]


def _scale_text(values: Sequence[float]) -> str:
    return "" if np.isnan(values).any() else f"{float(np.mean(values)):.2f}"


def _steps_text(values: Sequence[float]) -> str:
    """Return the median of steps; `not` if the rate has not returned in half of the seeds."""
    if np.isnan(values).any():
        return ""
    median = float(np.median(values))
    return "not" if math.isinf(median) or math.isnan(median) else f"{median:.0f}"
