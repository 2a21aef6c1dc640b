"""How an arm of a lab is compared with the reference arm: a ratio with its interval, and what it says.

The rules were chosen before the runs were made. Numbers of the same seed are compared, because these runs see the same
batches and begin with the same weights. The smallest effect of interest is half: an arm helps if it leaves less than
half of what the reference leaves, and cures if it leaves less than a tenth. Each is a one-sided test of the mean
logarithm of the ratios (t-test over seeds). Over the arms of a lab, p-values are corrected by Holm's method.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Ratio to the reference below which an arm helps; above its inverse, it harms.
SMALLEST_EFFECT = 0.5
#: Ratio below which an arm cures.
CURE = 0.1
#: p below which an outcome is shown.
SIGNIFICANT = 0.05
#: Number of seeds that a comparison needs.
MIN_SEEDS = 3

CURES, HELPS, SAME, HARMS, UNDECIDED = "cures", "helps", "no difference", "harms", "undecided"


class Ratio(NamedTuple):
    """Numbers of an arm as multiples of the reference arm's.

    Attributes:
        mean: geometric mean of the ratios over seeds.
        low, high: its 95 % confidence interval.
        seeds: number of seeds that both have.
        p: p-value of each outcome: that of the one-sided test against its bound; of two tests for "no difference".
    """

    mean: float
    low: float
    high: float
    seeds: int
    p: Mapping[str, float]


def paired_ratio(arm: Mapping[int, float], reference: Mapping[int, float], offset: float) -> Ratio | None:
    """Return how the numbers of an arm, by seed, compare with those of the reference; `None` for fewer than 3 seeds.

    `offset`, in the numbers' unit, is added to both: numbers can be 0, and differences below it do not count. An
    infinite number, of a run that has diverged, counts as a thousand times the highest finite one.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if len(seeds) < MIN_SEEDS:
        return None
    finite = [value for value in (*arm.values(), *reference.values()) if math.isfinite(value)]
    most = 1000 * max(finite, default=1.0)
    logs = np.array([math.log((min(arm[s], most) + offset) / (min(reference[s], most) + offset)) for s in seeds])
    mean, error = float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(len(seeds))
    spread = float(stats.t.ppf(0.975, len(seeds) - 1)) * error

    def below(bound: float) -> float:
        return (
            float(stats.t.cdf((mean - math.log(bound)) / error, len(seeds) - 1))
            if error
            else float(mean > math.log(bound))
        )

    smallest, largest = below(SMALLEST_EFFECT), 1 - below(1 / SMALLEST_EFFECT)
    p = {CURES: below(CURE), HELPS: smallest, SAME: max(1 - smallest, 1 - largest), HARMS: largest}
    return Ratio(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread), len(seeds), p)


def outcomes(ratios: Mapping[str, Ratio]) -> dict[str, str]:
    """Return what each arm does, by label: cures, helps, harms, makes no difference, or undecided.

    Each question is corrected over all arms by itself. The first outcome that is shown, in that order, counts.
    """
    found = dict.fromkeys(ratios, UNDECIDED)
    for outcome in (SAME, HARMS, HELPS, CURES):
        corrected = holm([ratio.p[outcome] for ratio in ratios.values()])
        for label, p in zip(ratios, corrected, strict=True):
            if p < SIGNIFICANT:
                found[label] = outcome
    return found


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
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - spread, mean + spread
