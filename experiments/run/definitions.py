"""Terms that the paper leaves open, each defined once.

Losses are (steps,) arrays in nats. `corrupted_rows` are the indices of the steps with corrupted batches, whose losses
say nothing about the model. The test loss is defined in training/validation/loss.py: the mean cross entropy
over the held-out documents.
"""

from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

#: Number of preceding normal steps that a loss is compared with.
SPIKE_WINDOW = 50
#: A spike is this many robust standard deviations above their median.
SPIKE_SIGMAS = 5.0
#: Spike score: maximum and minimum number of preceding steps, and threshold in standard deviations.
SCORE_WINDOW, SCORE_MIN_STEPS, SCORE_SIGMAS = 1000, 50, 7.0
#: A loss has diverged this many nats above its lowest level.
DIVERGED = 0.5
#: A loss is reached when the mean of this many steps is at it.
REACHED_WINDOW = 20
#: The excess loss is a mean over this many steps after a corrupted batch.
EXCESS_WINDOW = 10
#: The cost of skipping a batch is the slope of the loss over this many steps.
SLOPE_WINDOW = 50
#: A run has recovered when the mean of this many steps is within so many nats of the baseline run.
RECOVERED_WINDOW, RECOVERED = 5, 0.05


class Spike(NamedTuple):
    """A loss spike: steps `start` to `start + length - 1`, counted from 0."""

    start: int
    length: int


def loss_spikes(loss: np.ndarray, corrupted_rows: Collection[int] = ()) -> list[Spike]:
    """Find the loss spikes of a run, in order. The paper counts spikes without a definition; this one is ours.

    A step is in a spike if its loss is not finite, or more than 5 robust standard deviations (1.4826 times the median
    absolute deviation) above the median of the last 50 steps outside spikes. Consecutive steps are one spike. In the
    first 50 steps, only a loss that is not finite is a spike. A corrupted batch neither belongs to a spike nor ends
    one.

    Noise alone makes spikes too, and more of them in a longer run or one with heavier tails: see `loss_dips`. A loss
    that rises and stays high is one spike to its end, which hides later ones; a rise by half a nat is divergence.
    """
    spikes: list[Spike] = []
    last = -2
    limits = _spike_limits(loss, corrupted_rows)
    for step, value in enumerate(loss.tolist()):
        if step in corrupted_rows:
            last += last == step - 1
            continue
        if np.isfinite(value) and value <= limits[step]:
            continue
        if spikes and last == step - 1:
            spikes[-1] = Spike(spikes[-1].start, step + 1 - spikes[-1].start)
        else:
            spikes.append(Spike(step, 1))
        last = step
    return spikes


def loss_dips(loss: np.ndarray, corrupted_rows: Collection[int] = ()) -> int:
    """Count the dips of a loss: spikes downwards.

    Noise goes up and down equally often, so that the number of dips estimates how many spikes are noise. The reversed
    and negated loss is searched for spikes. It falls on average as the loss does, so that dips and spikes are equally
    far from the normal level. Steps in spikes are skipped.
    """
    in_spikes = {
        step for spike in loss_spikes(loss, corrupted_rows) for step in range(spike.start, spike.start + spike.length)
    }
    return len(loss_spikes(-loss[::-1], {len(loss) - 1 - step for step in {*corrupted_rows, *in_spikes}}))


def min_spike_height(loss: np.ndarray, corrupted_rows: Collection[int] = ()) -> float:
    """Return the jump in nats that makes a spike: the distance from the loss to its limit, at the median step.

    NaN for a run that is too short to have spikes.
    """
    margin = np.delete(_spike_limits(loss, corrupted_rows) - loss, sorted(corrupted_rows))
    normal = margin[np.isfinite(margin) & (margin >= 0)]
    return float(np.median(normal)) if len(normal) else float("nan")


def _spike_limits(loss: np.ndarray, corrupted_rows: Collection[int]) -> np.ndarray:
    """Return the highest normal loss of each step, infinite where too few steps precede."""
    return _cached_limits(np.asarray(loss, dtype=np.float64).tobytes(), frozenset(corrupted_rows))


@lru_cache(maxsize=1 << 9)
def _cached_limits(loss: bytes, corrupted_rows: frozenset[int]) -> np.ndarray:
    values = np.frombuffer(loss).tolist()
    normal: list[float] = []
    limits = np.full(len(values), np.inf)
    for step, value in enumerate(values):
        if step in corrupted_rows:
            continue
        recent = np.array(normal[-SPIKE_WINDOW:])
        if len(recent) == SPIKE_WINDOW:
            median = np.median(recent)
            limits[step] = median + SPIKE_SIGMAS * 1.4826 * np.median(np.abs(recent - median))
        if np.isfinite(value) and value <= limits[step]:
            normal.append(value)
    limits.flags.writeable = False
    return limits


def spike_score(values: np.ndarray, corrupted_rows: Collection[int] = ()) -> float:
    """Return OLMo 2's spike score: the fraction of losses or norms at least seven standard deviations from the mean.

    Mean and deviation are those of the last 1,000 values (arXiv 2501.00656, Section 3.1), or of all earlier ones if
    there are fewer. Values with fewer than 50 before them are not counted; NaN if none is counted. A value that is not
    finite counts as a spike and enters no mean.
    """
    before: list[float] = []
    counted = outliers = 0
    for value in (value for step, value in enumerate(values.tolist()) if step not in corrupted_rows):
        recent = np.array(before[-SCORE_WINDOW:])
        if len(recent) >= SCORE_MIN_STEPS:
            counted += 1
            outliers += not abs(value - recent.mean()) < SCORE_SIGMAS * recent.std()
        if np.isfinite(value):
            before.append(value)
    return outliers / counted if counted else float("nan")


def diverged(loss: np.ndarray) -> bool:
    """Return whether a run ended far above its lowest level.

    A run has diverged if the mean loss of its last tenth is not finite, or more than 0.5 nats above the lowest mean of
    as many consecutive steps.
    """
    length = max(1, len(loss) // 10)
    if not np.isfinite(loss[-length:]).all():
        return True
    means = _running_mean(np.where(np.isfinite(loss), loss, np.inf), length)
    return bool(means[-1] > means.min() + DIVERGED)


def tokens_to_reach(loss: np.ndarray, tokens: np.ndarray, target: float) -> float | None:
    """Return the tokens after which the mean loss of 20 steps is first at most a target; `None` if it never is.

    `tokens` are those processed after each step. Means that differ only by rounding count as equal.
    """
    length = min(REACHED_WINDOW, len(loss))
    means = _running_mean(np.where(np.isfinite(loss), loss, np.inf), length)
    reached = np.flatnonzero(means <= target + 1e-12 * abs(target))
    return float(tokens[reached[0] + length - 1]) if len(reached) else None


def excess_loss(loss: np.ndarray, baseline: np.ndarray, corrupted_rows: Collection[int]) -> float:
    """Return the mean loss after corrupted batches minus that of the baseline run, in nats.

    Each mean is over the 10 steps after a corrupted batch, or up to the next one; the result is their mean.
    """
    spans = corrupted_spans(corrupted_rows, len(loss))
    means = [float(np.mean((loss - baseline)[at + 1 : min(at + 1 + EXCESS_WINDOW, end)])) for at, end in spans]
    return float(np.mean(means))


def skip_cost(baseline: np.ndarray, corrupted_rows: Collection[int]) -> float:
    """Return the excess loss of a run that skips the corrupted batches: it has learnt from fewer batches.

    After the n-th corrupted batch such a run is n steps behind. Each step lowers the loss by the slope of a straight
    line through the 50 steps around (25 before to 24 after, as far as they exist). The result is the mean over the same
    batches as in `excess_loss`, 0 where the loss rises, and NaN where a loss around is not finite. It is rather too
    high: part of the slope can be the decay of the learning rate, in which the run would not be behind.
    """
    costs = []
    for at, _ in corrupted_spans(corrupted_rows, len(baseline)):
        around = baseline[max(0, at - SLOPE_WINDOW // 2) : at + SLOPE_WINDOW // 2]
        slope = float(np.polyfit(np.arange(len(around)), around, 1)[0]) if np.isfinite(around).all() else np.nan
        costs.append(-slope * sum(step <= at for step in corrupted_rows))
    return float(np.maximum(0.0, np.mean(costs)))


def recovery_steps(loss: np.ndarray, baseline: np.ndarray, corrupted_rows: Collection[int]) -> float:
    """Return the number of steps until a loss has recovered from a corrupted batch, averaged over the batches.

    A loss has recovered where the mean of 5 steps is first within 0.05 nats of the baseline run; the steps before the
    first of the 5 are counted. If that does not happen before the next corrupted batch or the end of the run, all steps
    until then are counted.
    """
    steps = []
    for at, end in corrupted_spans(corrupted_rows, len(loss)):
        excess = (loss - baseline)[at + 1 : end]
        length = min(RECOVERED_WINDOW, len(excess))
        recovered = np.flatnonzero(_running_mean(excess, length) <= RECOVERED)
        steps.append(int(recovered[0]) if len(recovered) else len(excess))
    return float(np.mean(steps))


def corrupted_spans(corrupted_rows: Collection[int], steps: int) -> list[tuple[int, int]]:
    """Return the index of each corrupted batch and of the next one (or the number of steps), if steps lie between."""
    return [(at, end) for at, end in pairwise([*sorted(corrupted_rows), steps]) if end > at + 1]


def _running_mean(values: np.ndarray, length: int) -> np.ndarray:
    """Return the means of `length` consecutive values; the first is that of the first `length` values."""
    return np.lib.stride_tricks.sliding_window_view(values, length).mean(axis=1)
