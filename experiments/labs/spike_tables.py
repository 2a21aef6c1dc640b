"""The tables of a lab on spikes: its arms compared with the reference, and which signal warns first."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.labs.declaration import Arm, SpikeLab
from experiments.labs.report import arm_cell, comparison_cells, csv_text, mean_text
from experiments.labs.spike_numbers import SIGNALS, SpikeNumbers, spike_numbers, warnings_of
from experiments.labs.statistics import Comparison, decide, paired_ratio
from experiments.run.collect import RunCollection
from experiments.run.read import Run

#: Added to areas and excesses before they are compared, in nats x steps: less than any spike, so that 0 has a ratio.
AREA_OFFSET = 1.0


class ArmResult(NamedTuple):
    """The runs of an arm.

    Attributes:
        arm: the arm.
        numbers: numbers of each finished run, by seed.
        ratio: its areas as multiples of the reference arm's; `None` for the reference, and for too few seeds.
        excess_ratio: the same of its excesses, without an outcome: this number was chosen after the first runs.
    """

    arm: Arm
    numbers: Mapping[int, SpikeNumbers]
    ratio: Comparison | None
    excess_ratio: Comparison | None


def arm_results(lab: SpikeLab, collection: RunCollection) -> list[ArmResult]:
    """Return the results of the arms that have a finished run, in the lab's order."""
    numbers = {
        arm: {
            seed: spike_numbers(run, (arm, seed) in collection.diverged)
            for seed in collection.seeds
            if (run := collection.runs.get((arm, seed)))
        }
        for arm in lab.arms
    }
    numbers = {arm: by_seed for arm, by_seed in numbers.items() if by_seed}
    areas, excesses = (_ratios(lab, numbers, field) for field in ("area", "excess"))
    areas = decide(areas)
    return [ArmResult(arm, by_seed, areas.get(arm.label), excesses.get(arm.label)) for arm, by_seed in numbers.items()]


def _ratios(lab: SpikeLab, numbers: Mapping[Arm, Mapping[int, SpikeNumbers]], field: str) -> dict[str, Comparison]:
    """Return a field of each arm as multiples of the reference arm's, by label; of arms with enough seeds."""
    values = {arm.label: {seed: getattr(each, field) for seed, each in runs.items()} for arm, runs in numbers.items()}
    reference = values.pop(lab.reference, {})
    ratios = {label: paired_ratio(by_seed, reference, AREA_OFFSET) for label, by_seed in values.items()}
    return {label: ratio for label, ratio in ratios.items() if ratio is not None}


HEADER = (
    "arm",
    "spikes in 10,000 steps",
    "area (nats x steps)",
    "ratio of areas (95 %)",
    "outcome",
    "excess (nats x steps)",
    "ratio of excesses (95 %)",
    "steps lost",
    "worst",
    "mean loss",
    "final loss",
    "clipped %",
    "at a lower rate %",
    "mean scale from then on",
    "seeds",
)


def table_rows(results: Sequence[ArmResult]) -> list[list[str]]:
    """Return the rows of the table of arms as text."""
    rows = []
    for result in results:
        columns = {field: [getattr(each, field) for each in result.numbers.values()] for field in SpikeNumbers._fields}
        rows.append(
            [
                arm_cell(result.arm.label, result.arm.is_control),
                mean_text(columns["per_10k"], 1),
                mean_text(columns["area"], 0),
                *comparison_cells(result.ratio),
                mean_text(columns["excess"], 0),
                result.excess_ratio.text() if result.excess_ratio else "",
                mean_text(columns["steps_lost"], 0),
                f"{max(columns['worst']):.0f}x",
                mean_text(columns["mean_loss"], 4),
                mean_text(columns["final_loss"], 4),
                f"{100 * float(np.mean(columns['clipped'])):.1f}",
                *_known(100 * np.array(columns["slowed"]), 0),
                *_known(np.array(columns["scale"]), 2),
                str(len(result.numbers)),
            ]
        )
    return rows


def _known(values: np.ndarray, decimals: int) -> list[str]:
    """Return the mean of some numbers as a cell, which is empty where runs have no such number."""
    return ["" if np.isnan(values).any() else f"{values.mean():.{decimals}f}"]


def csv_table(results: Sequence[ArmResult]) -> str:
    """Return the numbers of each run as CSV: a row for each arm and seed."""
    fields = [field for field in SpikeNumbers._fields if field != "spikes"]
    rows = []
    for result in results:
        for seed, numbers in result.numbers.items():
            values = [float(getattr(numbers, field)) for field in fields]
            starts = " ".join(str(spike.start + 1) for spike in numbers.spikes)
            rows.append([result.arm.label, " ".join(result.arm.overrides), seed, *values, starts])
    return csv_text(["arm", "overrides", "seed", *fields, "spike_steps"], rows)


def warning_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each signal: how many steps before a spike it warned, over all spikes of these runs."""
    found = [steps for run in runs for steps in warnings_of(run)]
    rows = []
    for name, label in SIGNALS.items():
        if steps := [each[name] for each in found if name in each]:
            low, median, high = np.percentile(steps, (10, 50, 90))
            first = sum(each[name] == max(each.values()) and each[name] > 0 for each in found if name in each)
            rows.append([label, f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"{first} of {len(steps)}"])
    return rows


WARNING_HEADER = ("signal", "median steps before the loss", "80 % of spikes", "first, or one of the first")
