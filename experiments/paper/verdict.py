"""What all verdicts on claims share: their outcomes, numbers of runs by seed, and statistics of numbers by seed."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.paper.measures import MEASURES, Reached, reach_final_loss
from experiments.paper.tables_and_figures import RunSpec
from experiments.run.collect import RunCollection

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable here"

#: Number of seeds that a verdict needs.
MIN_SEEDS = 3
#: p below which a difference is significant.
SIGNIFICANT = 0.05

TOO_FEW_SEEDS = "it needs three seeds that have all the compared runs, and there are fewer"


class NotTestable(Exception):
    """The runs cannot test a claim; the message is the reason."""


class Verdict(NamedTuple):
    """What runs show about a claim: supported, not supported, or not testable here; and sentences with the numbers."""

    outcome: str
    evidence: list[str]


Judge = Callable[[RunCollection], Verdict]


class Interval(NamedTuple):
    """A confidence interval of at least 95 %."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference, with the 95 % confidence interval of its mean."""

    mean: float
    p: float  # of the two-sided paired t-test; if all differences are equal, of the sign test, or 1 if they are 0
    seeds: int
    low: float
    high: float

    def text(self, decimals: int = 3) -> str:
        """Return it as a phrase, with its interval."""
        low, high = f"{self.low:.{decimals}f}", f"{self.high:.{decimals}f}"
        return f"{self.mean:+.{decimals}f} (p = {self.p:.2g}, {self.seeds} seeds, 95 %: {low} to {high})"


def difference_by_seed(one: Mapping[int, float], other: Mapping[int, float] | None = None) -> Difference:
    """Return the difference of numbers by seed, or from zero, over the seeds that both have.

    Raises `NotTestable` if there are fewer seeds than a verdict needs.
    """
    if other is None:
        other = dict.fromkeys(one, 0.0)
    differences = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    require_seeds(differences)
    mean, seeds = float(differences.mean()), len(differences)
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        return Difference(mean, 1.0 if differences[0] == 0 else 0.5 ** (seeds - 1), seeds, mean, mean)
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(test.pvalue), seeds, float(low), float(high))


def difference_text(compute: Callable[[], Difference]) -> str:
    """Return a difference on which no verdict depends, or the reason why there is none."""
    try:
        return compute().text()
    except NotTestable as reason:
        return str(reason)


def event_rate(events: int, runs: int) -> Interval:
    """Return the exact confidence interval of the number of events per run (Poisson, Garwood)."""
    low = float(stats.chi2.ppf(0.025, 2 * events)) / 2 if events else 0.0
    return Interval(low / runs, float(stats.chi2.ppf(0.975, 2 * events + 2)) / 2 / runs)


def run_text(spec: RunSpec, seeds: Sequence[int] = ()) -> str:
    """Return the overrides of runs, as on the command line."""
    return " ".join([*spec.overrides, *([f"seed={','.join(map(str, seeds))}"] if seeds else [])])


def require_seeds(values: Sized) -> None:
    """Raise `NotTestable` if there are fewer values, one for each seed, than a verdict needs."""
    if len(values) < MIN_SEEDS:
        raise NotTestable(TOO_FEW_SEEDS)


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
