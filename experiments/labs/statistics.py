"""How an arm of a lab is compared with the reference arm: a difference over seeds with its interval, and what it says.

The rules were chosen before the runs were made. Numbers of the same seed are compared, because these runs see the same
batches and begin with the same weights. The smallest effects of interest are a factor of two in the area of spikes, 0.1
nats of learning-rate sensitivity or of a mean loss over rates, 0.02 nats of excess loss after bad batches, and 0.005
nats of test loss without them or of mean loss after a fork. Arms whose difference is shown to be smaller are
equivalent. An arm helps if it leaves less than half of the reference's spikes, and cures if it leaves less than a
tenth. Each outcome is a one-sided t-test over seeds of the mean difference, or of the mean logarithm of ratios, against
its bound. Over the arms of a lab, and in the lab of forks over those after one change, p-values are corrected by
Holm's method.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Ratio to the reference below which an arm helps; above its inverse, it harms.
SMALLEST_RATIO = 0.5
#: Ratio below which an arm cures.
CURE = 0.1
#: Difference from the reference, in nats, from which an arm raises or lowers a number.
SMALLEST_NATS = 0.1
#: p below which an outcome is shown.
SIGNIFICANT = 0.05
#: Number of seeds that a comparison needs.
MIN_SEEDS = 3
#: An infinite number, of a run that has diverged, counts as so many times the highest finite one.
DIVERGED_FACTOR = 1000

CURES, HELPS, EQUIVALENT, HARMS, UNDECIDED = "cures", "helps", "equivalent", "harms", "undecided"
LOWERS, RAISES = "lowers it", "raises it"


class Comparison(NamedTuple):
    """An arm compared with the reference arm.

    Attributes:
        mean: mean difference over seeds, or geometric mean of the ratios.
        low, high: its 95 % confidence interval.
        seeds: number of seeds that both have.
        p: p-value of each outcome, from the least to the most important.
        outcome: the most important one that is shown, see `decide`.
    """

    mean: float
    low: float
    high: float
    seeds: int
    p: Mapping[str, float]
    outcome: str = UNDECIDED

    def text(self) -> str:
        """Return the mean with its interval."""
        return f"{self.mean:.2g} ({self.low:.2g} to {self.high:.2g})"


class _Test(NamedTuple):
    """One-sided t-tests of the mean of some numbers."""

    mean: float
    error: float
    freedom: int

    def below(self, bound: float) -> float:
        """Return the p-value of the mean's being below a bound."""
        distance = self.mean - bound
        return float(stats.t.cdf(distance / self.error, self.freedom)) if self.error else float(distance >= 0)

    def above(self, bound: float) -> float:
        """Return the p-value of the mean's being above a bound."""
        return _Test(-self.mean, self.error, self.freedom).below(-bound)

    def between(self, low: float, high: float) -> float:
        """Return the p-value of the mean's being between two bounds."""
        return max(self.above(low), self.below(high))

    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the mean."""
        spread = float(stats.t.ppf(0.975, self.freedom)) * self.error
        return self.mean - spread, self.mean + spread


def _test(values: Sequence[float]) -> _Test:
    return _Test(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)


def paired_ratio(arm: Mapping[int, float], reference: Mapping[int, float], offset: float) -> Comparison | None:
    """Return how the numbers of an arm, by seed, compare with those of the reference as ratios.

    `offset`, in the numbers' unit, is added to both: numbers can be 0, and differences below it do not count. `None`
    for fewer than 3 common seeds.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if len(seeds) < MIN_SEEDS:
        return None
    finite = [value for value in (*arm.values(), *reference.values()) if math.isfinite(value)]
    most = DIVERGED_FACTOR * max([*finite, offset])  # also where no run has any, which counts as `offset`
    test = _test([math.log((min(arm[s], most) + offset) / (min(reference[s], most) + offset)) for s in seeds])
    half = math.log(SMALLEST_RATIO)
    p = {
        EQUIVALENT: test.between(half, -half),
        HARMS: test.above(-half),
        HELPS: test.below(half),
        CURES: test.below(math.log(CURE)),
    }
    low, high = test.interval()
    return Comparison(math.exp(test.mean), math.exp(low), math.exp(high), len(seeds), p)


def paired_difference(
    arm: Mapping[int, float], reference: Mapping[int, float], smallest: float = SMALLEST_NATS
) -> Comparison | None:
    """Return how the numbers of an arm, by seed and in nats, differ from those of the reference.

    `smallest` is the smallest effect of interest, in nats. `None` for fewer than 3 common seeds.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if len(seeds) < MIN_SEEDS:
        return None
    test = _test([arm[s] - reference[s] for s in seeds])
    p = {
        EQUIVALENT: test.between(-smallest, smallest),
        RAISES: test.above(smallest),
        LOWERS: test.below(-smallest),
    }
    return Comparison(test.mean, *test.interval(), len(seeds), p)


def differences(
    values: Mapping[str, Mapping[int, float]], reference: str, smallest: float = SMALLEST_NATS
) -> dict[str, Comparison]:
    """Return how the numbers of each other arm differ from those of the reference arm, by label, with outcomes.

    `values` are by label and seed. Arms with too few common seeds are left out; see `paired_difference`.
    """
    of_reference = values.get(reference, {})
    return decide(
        {
            label: change
            for label, by_seed in values.items()
            if label != reference and (change := paired_difference(by_seed, of_reference, smallest)) is not None
        }
    )


def decide(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Return the comparison of each arm, by label, with its outcome: the most important one that is shown.

    The p-values of each outcome are corrected over all arms.
    """
    found = dict.fromkeys(comparisons, UNDECIDED)
    for outcome in next((list(comparison.p) for comparison in comparisons.values()), []):
        corrected = holm([comparison.p[outcome] for comparison in comparisons.values()])
        for label, p in zip(comparisons, corrected, strict=True):
            if p < SIGNIFICANT:
                found[label] = outcome
    return {label: comparison._replace(outcome=found[label]) for label, comparison in comparisons.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for so many tests, by Holm's step-down method, in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a mean over seeds; NaN for one value, or values that are not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    return _test(values).interval()
