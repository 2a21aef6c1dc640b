"""Numbers from runs with their 95 % confidence intervals, and tests that agree with the intervals.

The p-values are one-sided. The 95 % interval is above a bound if and only if p < 0.025 for being above it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from scipy import stats

#: Probability that a confidence interval misses.
MISSES = 0.05
#: Number of bisections that find the level at which an interval touches a bound: p is exact to 1e-9.
BISECTIONS = 30


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Number(Protocol):
    """A number with its interval.

    Attributes:
        value: the number.
        seeds: number of seeds, or 0 if the interval does not come from seeds.
    """

    @property
    def value(self) -> float:
        """The number."""

    @property
    def seeds(self) -> int:
        """Number of seeds behind the interval; 0 if it has another unit."""

    def interval(self) -> Interval:
        """Return the 95 % confidence interval."""

    def above(self, bound: float) -> float:
        """Return the p-value of its being above a bound."""

    def below(self, bound: float) -> float:
        """Return the p-value of its being below a bound."""


class Mean(NamedTuple):
    """A mean over seeds, with the interval of the t-distribution.

    If all seeds have the same number, the error is 0. Then p is that of the sign test, so that few seeds show nothing.
    """

    value: float
    error: float  # standard error
    seeds: int

    def interval(self) -> Interval:
        """Return the 95 % confidence interval."""
        spread = float(stats.t.ppf(1 - MISSES / 2, self.seeds - 1)) * self.error
        return Interval(self.value - spread, self.value + spread)

    def above(self, bound: float) -> float:
        """Return the p-value of its being above a bound."""
        if not self.error:
            return 0.5**self.seeds if self.value > bound else 1.0
        return float(stats.t.sf((self.value - bound) / self.error, self.seeds - 1))

    def below(self, bound: float) -> float:
        """Return the p-value of its being below a bound."""
        return self._replace(value=-self.value).above(-bound)


class Share(NamedTuple):
    """A share of independent cases, with the exact interval of Clopper and Pearson."""

    events: int
    cases: int

    @property
    def value(self) -> float:
        """The share."""
        return self.events / self.cases

    @property
    def seeds(self) -> int:
        """0: the interval comes from the cases."""
        return 0

    def interval(self) -> Interval:
        """Return the confidence interval of at least 95 %."""
        low, high = stats.binomtest(self.events, self.cases).proportion_ci(1 - MISSES, "exact")
        return Interval(float(low), float(high))

    def above(self, bound: float) -> float:
        """Return the p-value of its being above a bound."""
        return float(stats.binom.sf(self.events - 1, self.cases, bound))

    def below(self, bound: float) -> float:
        """Return the p-value of its being below a bound."""
        return float(stats.binom.cdf(self.events, self.cases, bound))


class ExcessEvents(NamedTuple):
    """Events minus noise events in a run, with the bounds of two exact Poisson intervals (Garwood) of 95 % each."""

    events: int
    noise: int
    runs: int

    @property
    def value(self) -> float:
        """Events minus noise events, per run."""
        return (self.events - self.noise) / self.runs

    @property
    def seeds(self) -> int:
        """0: the interval comes from the events."""
        return 0

    def interval(self, misses: float = MISSES) -> Interval:
        """Return the confidence interval; `misses` is the probability that each of both intervals misses."""
        events, noise = (event_rate(count, self.runs, misses) for count in (self.events, self.noise))
        return Interval(events.low - noise.high, events.high - noise.low)

    def above(self, bound: float) -> float:
        """Return the p-value of its being above a bound."""
        return _touching(lambda misses: self.interval(misses).low > bound)

    def below(self, bound: float) -> float:
        """Return the p-value of its being below a bound."""
        return _touching(lambda misses: self.interval(misses).high < bound)


class Certain(NamedTuple):
    """What was observed and needs no test, such as the infinite loss of a run that has diverged."""

    value: float

    @property
    def seeds(self) -> int:
        """0: there is no interval."""
        return 0

    def interval(self) -> Interval:
        """Return the number itself, twice."""
        return Interval(self.value, self.value)

    def above(self, bound: float) -> float:
        """Return 0 if it is above a bound, else 1."""
        return float(not self.value > bound)

    def below(self, bound: float) -> float:
        """Return 0 if it is below a bound, else 1."""
        return float(not self.value < bound)


def event_rate(events: int, runs: int, misses: float = MISSES) -> Interval:
    """Return the exact confidence interval of the number of events per run (Poisson, Garwood)."""
    low = float(stats.chi2.ppf(misses / 2, 2 * events)) / 2 if events else 0.0
    return Interval(low / runs, float(stats.chi2.ppf(1 - misses / 2, 2 * events + 2)) / 2 / runs)


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of two numbers or more, one for each seed. Rounding apart, equal numbers have no error."""
    numbers = np.array(values, dtype=float)
    is_equal = np.ptp(numbers) <= 1e-12 * max(1.0, float(np.abs(numbers).max()))
    error = 0.0 if is_equal else float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Mean(float(numbers.mean()), error, len(numbers))


def _touching(is_beyond: Callable[[float], bool]) -> float:
    """Return half of the lowest probability of missing at which an interval is beyond a bound; 1 if it never is."""
    if not is_beyond(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return high / 2
