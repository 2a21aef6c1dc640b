"""Numbers of the paper's runs by seed, which the verdicts on its claims compare."""

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from experiments.claims.verdict import NotTestable
from experiments.paper.measures import MEASURES, Reached, reach_final_loss
from experiments.paper.tables_and_figures import RunSpec
from experiments.run.collect import RunCollection


def run_text(spec: RunSpec, seeds: Sequence[int] = ()) -> str:
    """Return the overrides of runs, as on the command line."""
    return " ".join([*spec.overrides, *([f"seed={','.join(map(str, seeds))}"] if seeds else [])])


def require_not_diverged(collection: RunCollection, specs: Iterable[RunSpec]) -> None:
    """Raise `NotTestable` if a run has diverged."""
    for spec in specs:
        if seeds := collection.diverged_seeds(spec):
            raise NotTestable(f"a required run has diverged: {run_text(spec, seeds)}")


def measure_by_seed(
    collection: RunCollection, measure: str, specs: Collection[RunSpec], baseline: RunSpec | None = None
) -> dict[int, float]:
    """Return the mean of a measure over runs, by seed, for the seeds that have all of them, and the baseline run.

    Raises `NotTestable` if one has no such number, or it is not finite: a mean over the others would exclude the worst.
    """
    means = {}
    for seed in collection.seeds:
        baseline_run = None if baseline is None else collection.runs.get((baseline, seed))
        if baseline is not None and baseline_run is None:
            continue
        values = []
        for spec in specs:
            if (run := collection.runs.get((spec, seed))) is None:
                break
            value = MEASURES[measure].compute(run, baseline_run)
            if value is None or not math.isfinite(value):
                against = "" if baseline is None else f", with the baseline run {run_text(baseline)}"
                raise NotTestable(f"a compared run has no finite {measure}: {run_text(spec, [seed])}{against}")
            values.append(value)
        else:
            means[seed] = float(np.mean(values))
    return means


def reached_by_seed(collection: RunCollection, fixed: RunSpec, zclip: RunSpec) -> dict[int, Reached]:
    """Return when ZClip reaches the final loss of fixed clipping, by seed; never if it has diverged.

    Raises `NotTestable` if fixed clipping has diverged, or its final loss is not finite.
    """
    require_not_diverged(collection, [fixed])
    reached = {}
    for seed in collection.complete_seeds([fixed, zclip]):
        result = reach_final_loss(collection.runs[fixed, seed], collection.runs[zclip, seed])
        if not math.isfinite(result.loss):
            raise NotTestable(f"a required run has no finite final loss: {run_text(fixed, [seed])}")
        reached[seed] = result._replace(tokens=None) if (zclip, seed) in collection.diverged else result
    return reached
