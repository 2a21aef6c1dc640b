"""Statistics of numbers that are paired by seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Number of seeds that a verdict needs.
MIN_SEEDS = 3
#: p below which a difference is significant.
SIGNIFICANT = 0.05

TOO_FEW_SEEDS = "it needs three seeds that have all the compared runs, and there are fewer"


class NotTestable(Exception):
    """The runs cannot test a claim; the message is the reason."""


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
        mean: mean of the differences.
        p: of the two-sided paired t-test. If all differences are equal, of the sign test; 1 if they are 0.
        seeds: number of pairs.
        low, high: ends of the 95 % confidence interval of the mean.
    """

    mean: float
    p: float
    seeds: int
    low: float
    high: float

    def text(self, decimals: int = 3) -> str:
        """Return it as a phrase, with its interval."""
        low, high = f"{self.low:.{decimals}f}", f"{self.high:.{decimals}f}"
        return f"{self.mean:+.{decimals}f} (p = {self.p:.2g}, {self.seeds} seeds, 95 %: {low} to {high})"

    @property
    def is_negative(self) -> bool:
        """Whether it is significantly below zero."""
        return self.mean < 0 and self.p < SIGNIFICANT

    @property
    def is_positive(self) -> bool:
        """Whether it is significantly above zero."""
        return self.mean > 0 and self.p < SIGNIFICANT


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the difference of two samples, pair by pair.

    Raises:
        NotTestable: there are fewer pairs than a verdict needs.
    """
    differences = np.subtract(one, other)
    if len(differences) < MIN_SEEDS:
        raise NotTestable(TOO_FEW_SEEDS)
    mean, seeds = float(differences.mean()), len(differences)
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        return Difference(mean, 1.0 if differences[0] == 0 else 0.5 ** (seeds - 1), seeds, mean, mean)
    margin = float(stats.sem(differences)) * float(stats.t.ppf(0.975, seeds - 1))
    p = float(stats.ttest_1samp(differences, 0).pvalue)
    return Difference(mean, p, seeds, mean - margin, mean + margin)


def difference_by_seed(one: Mapping[int, float], other: Mapping[int, float] | None = None) -> Difference:
    """Return the difference of numbers by seed, or from zero, over the seeds that both have.

    Raises:
        NotTestable: there are fewer seeds than a verdict needs.
    """
    seeds = sorted(one if other is None else one.keys() & other.keys())
    return paired_difference([one[seed] for seed in seeds], [0.0 if other is None else other[seed] for seed in seeds])


def difference_text(compute: Callable[[], Difference], decimals: int = 3) -> str:
    """Return a difference on which no verdict depends, or the reason why there is none."""
    try:
        return compute().text(decimals)
    except NotTestable as reason:
        return str(reason)


def sign_test(higher: int, lower: int) -> float:
    """Return p of the two-sided sign test.

    Args:
        higher, lower: number of seeds with a higher and with a lower value.
    """
    return float(stats.binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0


class Rate(NamedTuple):
    """Number of events per run.

    Attributes:
        events: in all runs.
        runs: number of runs.
        low, high: ends of the exact 95 % confidence interval of events per run (Poisson).
    """

    events: int
    runs: int
    low: float
    high: float


def event_rate(events: int, runs: int) -> Rate:
    """Return the number of events per run, with its confidence interval (Garwood).

    Args:
        events: in all runs.
        runs: number of runs.
    """
    low = float(stats.chi2.ppf(0.025, 2 * events)) / 2 if events else 0.0
    return Rate(events, runs, low / runs, float(stats.chi2.ppf(0.975, 2 * events + 2)) / 2 / runs)
