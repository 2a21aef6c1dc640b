"""The report of a lab on learning rates: the curve and the sensitivity of each arm."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.escape import escaped_table
from experiments.labs.declaration import RateLab
from experiments.labs.rates import USABLE, RateResult, rate_results, usable_rates
from experiments.labs.report import (
    LabReport,
    arm_cell,
    comparison_cells,
    csv_text,
    lab_text,
    mean_text,
    outcome_sentences,
)
from experiments.labs.statistics import EQUIVALENT, LOWERS, RAISES, SMALLEST_NATS, UNDECIDED
from experiments.run.collect import RunCollection
from experiments.run.style import draw_grid, label_styles

HEADER = (
    "arm",
    "best rate",
    "loss there",
    "usable rates",
    "sensitivity (nats, 95 %)",
    "minus the reference (95 %)",
    "outcome",
    "mean loss over the rates (nats, 95 %)",
    "minus the reference (95 %)",
    "outcome",
    "seeds",
)
#: What the outcomes say of the sensitivity of the reference arm.
SENTENCES = {
    LOWERS: f"Lower by more than {SMALLEST_NATS:g} nats with",
    EQUIVALENT: f"Within {SMALLEST_NATS:g} nats of it with",
    RAISES: f"Higher by more than {SMALLEST_NATS:g} nats with",
    UNDECIDED: "These seeds do not decide about",
}
#: What they say of its mean loss over the rates.
LOSS_SENTENCES = {
    LOWERS: f"The mean loss over the rates is lower by more than {SMALLEST_NATS:g} nats with",
    EQUIVALENT: f"The mean loss over the rates is within {SMALLEST_NATS:g} nats with",
    RAISES: f"The mean loss over the rates is higher by more than {SMALLEST_NATS:g} nats with",
    UNDECIDED: "These seeds do not decide about the mean loss over the rates of",
}


def rate_report(lab: RateLab, collection: RunCollection, made: str) -> LabReport:
    """Return the report, the numbers and the figure of a lab; `made` says when the report was made."""
    results = rate_results(lab, collection)
    figures = {"rates": draw_rates(lab, results)} if results else {}
    best = min((result.mean_losses.min() for result in results), default=np.nan)
    sections = {"Arms": escaped_table(HEADER, [table_row(lab, result, best) for result in results])}
    text = lab_text(lab, collection, findings(lab, results), sections, [*figures], made)
    return LabReport(text, csv_table(lab, results), figures)


def findings(lab: RateLab, results: Sequence[RateResult]) -> list[str]:
    """Return sentences on the sensitivity of the reference arm, and on the others against it."""
    reference = [result for result in results if result.arm.label == lab.reference]
    said = [
        f"With {lab.reference}, the learning-rate sensitivity is {mean_text(result.sensitivities, 2)} nats."
        for result in reference
    ]
    changes = {result.arm.label: result.comparison for result in results if result.comparison is not None}
    losses = {result.arm.label: result.loss_comparison for result in results if result.loss_comparison is not None}
    said += outcome_sentences(changes, SENTENCES) + outcome_sentences(losses, LOSS_SENTENCES)
    for result in results:
        lowest = result.mean_losses.min()
        above = [best for best in (other.mean_losses.min() for other in reference) if lowest > best + USABLE]
        if result.comparison is not None and result.comparison.outcome == LOWERS and above:
            said.append(
                f"{result.arm.label} learns less all the same: its best loss is {lowest:.3f}, not {above[0]:.3f}."
            )
    return said


def table_row(lab: RateLab, result: RateResult, best: float) -> list[str]:
    """Return the row of an arm as text; `best` is the lowest loss of all arms, which usable rates are close to."""
    losses = result.mean_losses
    usable = usable_rates(lab, losses, best)
    return [
        arm_cell(result.arm.label, result.arm.is_control),
        f"{lab.rates[int(losses.argmin())]:g}",
        f"{losses.min():.3f}",
        rates_text(lab.rates, usable),
        mean_text(result.sensitivities, 3),
        *comparison_cells(result.comparison),
        mean_text(result.seed_losses, 3),
        *comparison_cells(result.loss_comparison),
        str(len(result.curves)),
    ]


def rates_text(rates: Sequence[float], usable: Sequence[float]) -> str:
    """Return usable rates as ranges of neighbours among all rates, such as `0.001 to 0.01, 0.1`."""
    groups: list[list[float]] = []
    for before, rate in zip((None, *rates), rates, strict=False):
        if rate in usable:
            if before not in usable:
                groups.append([])
            groups[-1].append(rate)
    return ", ".join(f"{g[0]:g} to {g[-1]:g}" if g[1:] else f"{g[0]:g}" for g in groups) or "none"


def csv_table(lab: RateLab, results: Sequence[RateResult]) -> str:
    """Return the final loss of each run as CSV."""
    rows = [
        [result.arm.label, " ".join(result.arm.overrides), f"{rate:g}", seed, float(loss)]
        for result in results
        for seed, curve in result.curves.items()
        for rate, loss in zip(lab.rates, curve.losses, strict=True)
    ]
    return csv_text(["arm", "overrides", "lr", "seed", "final_loss"], rows)


def draw_rates(lab: RateLab, results: Sequence[RateResult]) -> Figure:
    """Return the curves: the mean loss over seeds at each rate, with a band from the lowest to the highest."""
    figure, ax = plt.subplots(figsize=(8, 5.4), layout="constrained")
    styles = label_styles([result.arm.label for result in results])
    for result in results:
        style = styles[result.arm.label]
        losses = np.array([curve.losses for curve in result.curves.values()])
        label = f"{result.arm.label}, sensitivity {np.mean(result.sensitivities):.2f}"
        look = {"marker": style.marker, "ls": style.dashes, "color": style.color, "ms": 5, "lw": 1.4}
        ax.plot(lab.rates, result.mean_losses, **look, label=label)
        ax.fill_between(lab.rates, losses.min(axis=0), losses.max(axis=0), color=style.color, alpha=0.12, lw=0)
    ax.set_xscale("log")
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("final test loss (nats), at most that before training")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, handlelength=4)
    draw_grid(figure)
    return figure
