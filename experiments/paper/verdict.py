"""What all verdicts on claims share: their outcomes, and numbers of runs by seed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.paper.collect import RunCollection
from experiments.paper.measures import MEASURES, Reached, reach_final_loss
from experiments.paper.statistics import NotTestable
from experiments.paper.suites import LEARNING_RATES, TABLES, RunSpec

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable here"


class Verdict(NamedTuple):
    """What runs show about a claim.

    Attributes:
        outcome: supported, not supported, or not testable here.
        evidence: sentences with the numbers.
    """

    outcome: str
    evidence: list[str]


Judge = Callable[[RunCollection], Verdict]


def diverged_seeds(collection: RunCollection, spec: RunSpec) -> list[int]:
    """Return the seeds with which a run has diverged."""
    return [seed for seed in collection.seeds if (spec, seed) in collection.diverged]


def complete_seeds(collection: RunCollection, specs: Iterable[RunSpec]) -> list[int]:
    """Return the seeds of which all runs are finished."""
    return sorted(set.intersection(*({seed for other, seed in collection.runs if other == spec} for spec in specs)))


def run_text(spec: RunSpec, seeds: Sequence[int]) -> str:
    """Return the overrides of runs, as on the command line."""
    return " ".join([*spec.overrides, *([f"seed={','.join(map(str, seeds))}"] if seeds else [])])


def require_not_diverged(collection: RunCollection, specs: Sequence[RunSpec]) -> None:
    """Raise `NotTestable` if a run has diverged."""
    for spec in specs:
        if seeds := diverged_seeds(collection, spec):
            raise NotTestable(f"a required run has diverged: {run_text(spec, seeds)}")


def measure_by_seed(
    collection: RunCollection, measure: str, pairs: Sequence[tuple[RunSpec, RunSpec | None]]
) -> dict[int, float]:
    """Return the mean of a measure over runs, by seed, for the seeds that have all of them.

    Args:
        collection: the runs.
        measure: key of `MEASURES`.
        pairs: runs, each with its baseline run if the measure needs one.

    Raises:
        NotTestable: a finished run has no such number, or it is not finite. A mean over the others would exclude the
            worst.
    """
    means = {}
    for seed in collection.seeds:
        values = []
        for spec, baseline_spec in pairs:
            run = collection.runs.get((spec, seed))
            baseline = None if baseline_spec is None else collection.runs.get((baseline_spec, seed))
            if run is None or (baseline_spec is not None and baseline is None):
                break
            value = MEASURES[measure].compute(run, baseline)
            if value is None or not math.isfinite(value):
                against = "" if baseline_spec is None else f", with the baseline run {run_text(baseline_spec, [])}"
                raise NotTestable(f"a compared run has no finite {measure}: {run_text(spec, [seed])}{against}")
            values.append(value)
        else:
            means[seed] = float(np.mean(values))
    return means


def losses_by_seed(collection: RunCollection, measure: str, specs: Sequence[RunSpec]) -> dict[int, float]:
    """Return the mean loss over runs by seed; raise `NotTestable` if one has diverged."""
    require_not_diverged(collection, specs)
    return measure_by_seed(collection, measure, [(spec, None) for spec in specs])


def reached_by_seed(collection: RunCollection, fixed: RunSpec, zclip: RunSpec) -> dict[int, Reached]:
    """Return when ZClip reaches the final loss of fixed clipping, by seed; never if it has diverged.

    Raises:
        NotTestable: fixed clipping has diverged, or its final loss is not finite.
    """
    require_not_diverged(collection, [fixed])
    reached = {}
    for seed in collection.seeds:
        fixed_run, zclip_run = collection.runs.get((fixed, seed)), collection.runs.get((zclip, seed))
        if fixed_run is not None and zclip_run is not None:
            result = reach_final_loss(fixed_run, zclip_run)
            if not math.isfinite(result.loss):
                raise NotTestable(f"a required run has no finite final loss: {run_text(fixed, [seed])}")
            reached[seed] = result._replace(tokens=None) if (zclip, seed) in collection.diverged else result
    return reached


def specs_by_rate() -> dict[float, Mapping[str, RunSpec]]:
    """Return the runs of Table 2, by the paper's learning rate and the strategy's group."""
    return {lr: row.specs for lr, row in zip(LEARNING_RATES, TABLES["table2"].rows, strict=True)}
