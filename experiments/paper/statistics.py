"""Statistics of numbers that belong together seed by seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Seeds that a verdict needs.
LEAST_SEEDS = 3
#: p below which a difference counts.
SIGNIFICANT = 0.05

TOO_FEW = "it needs three seeds that have all the runs that are compared, and there are fewer"


class NotTestable(Exception):
    """Runs say nothing of a claim; why."""


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
        mean: of the differences.
        p: of the two-sided paired t-test; of the sign test where all differences are the same, 1 where they are 0.
        seeds: how many pairs there are.
        least, most: ends of the 95 % interval of the mean.
    """

    mean: float
    p: float
    seeds: int
    least: float
    most: float

    def says(self, decimals: int = 3) -> str:
        """Return it as a phrase, with its interval."""
        least, most = f"{self.least:.{decimals}f}", f"{self.most:.{decimals}f}"
        return f"{self.mean:+.{decimals}f} (p = {self.p:.2g}, {self.seeds} seeds, 95 %: {least} to {most})"

    @property
    def below(self) -> bool:
        """Whether it is below zero, and not by chance."""
        return self.mean < 0 and self.p < SIGNIFICANT

    @property
    def above(self) -> bool:
        """Whether it is above zero, and not by chance."""
        return self.mean > 0 and self.p < SIGNIFICANT


def paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the difference of two samples, pair by pair.

    Raises:
        NotTestable: there are fewer pairs than a verdict needs.
    """
    differences = np.subtract(one, other)
    if len(differences) < LEAST_SEEDS:
        raise NotTestable(TOO_FEW)
    mean, seeds = float(differences.mean()), len(differences)
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        return Difference(mean, 1.0 if differences[0] == 0 else 0.5 ** (seeds - 1), seeds, mean, mean)
    error = float(stats.sem(differences)) * float(stats.t.ppf(0.975, seeds - 1))
    p = float(stats.ttest_1samp(differences, 0).pvalue)
    return Difference(mean, p, seeds, mean - error, mean + error)


def difference(one: Mapping[int, float], other: Mapping[int, float] | None = None) -> Difference:
    """Return how far numbers are above others, or above zero, by seed, of seeds that are in both.

    Raises:
        NotTestable: there are fewer than a verdict needs.
    """
    seeds = sorted(one if other is None else one.keys() & other.keys())
    return paired([one[seed] for seed in seeds], [0.0 if other is None else other[seed] for seed in seeds])


def said(find: Callable[[], Difference], decimals: int = 3) -> str:
    """Return a difference that no verdict hangs on, or why there is none."""
    try:
        return find().says(decimals)
    except NotTestable as why:
        return str(why)


def signs(higher: int, lower: int) -> float:
    """Return p of the two-sided sign test, of how many seeds are higher and how many lower."""
    return float(stats.binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0


class Rate(NamedTuple):
    """How many events there are in a run.

    Attributes:
        events: in all.
        runs: there are.
        least, most: ends of the 95 % interval of events in a run (Poisson, exact).
    """

    events: int
    runs: int
    least: float
    most: float


def rate(events: int, runs: int) -> Rate:
    """Return how many events there are in a run, of as many as there are in some runs."""
    least = float(stats.chi2.ppf(0.025, 2 * events)) / 2 if events else 0.0
    return Rate(events, runs, least / runs, float(stats.chi2.ppf(0.975, 2 * events + 2)) / 2 / runs)
