"""Terms the paper leaves open, each defined once.

The test loss, the other one, is the mean cross entropy in nats over the held-out documents (training/validation/validation_set.py).
"""

from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

#: Preceding steps that say what is normal.
SPIKE_WINDOW = 50
#: Robust standard deviations above their median that make a spike.
SPIKE_SIGMAS = 5.0
#: Of the spike score: preceding steps, how many there must be at least, and standard deviations.
SCORE_WINDOW, SCORE_LEAST, SCORE_SIGMAS = 1000, 50, 7.0
#: Nats above its lowest level at which a loss has diverged.
DIVERGED = 0.5
#: Steps whose mean says whether a loss is reached.
REACHED_WINDOW = 20
#: Steps after a bad batch that its excursion is taken over.
EXCURSION = 10
#: Steps whose slope says what a lost batch costs.
SLOPE_WINDOW = 50
#: Steps whose mean says whether a run has recovered, and within how many nats of the undisturbed run.
RECOVERED_WINDOW, RECOVERED = 5, 0.05


class Spike(NamedTuple):
    """One excursion of the loss: steps `start` to `start + length - 1`, counted from 0."""

    start: int
    length: int


def loss_spikes(
    loss: np.ndarray, corrupted_rows: Collection[int] = (), window: int = SPIKE_WINDOW, sigmas: float = SPIKE_SIGMAS
) -> list[Spike]:
    """Find the loss spikes of a run. The paper counts spikes without saying what one is; this is our definition.

    A step is in a spike if its loss is not finite, or more than `sigmas` robust standard deviations (1.4826 times
    the median absolute deviation) above the median of the last `window` steps that were in none. Steps in a
    row are one spike. The first `window` steps can only spike by not being finite.

    The loss of a bad batch that was put in says nothing about the model: it is in no spike, and ends none.

    Noise alone makes such steps too, the more the longer a run and the heavier its tails: see `loss_dips`. A loss that
    rises and stays there is in one spike to its end, which hides later ones; half a nat of it is divergence.

    Args:
        loss: (steps,) training loss of each step.
        corrupted_rows: indices of steps to pass over, those of bad batches.
        window: W above.
        sigmas: threshold.

    Returns:
        The spikes in order.
    """
    spikes: list[Spike] = []
    last = -2
    limits = _limits(loss, corrupted_rows, window, sigmas)
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
    """Return how often a loss is as far below what is normal as it is above in a spike.

    Spikes go up only: where noise is as likely to go either way, there are as many of its own among them. The run is
    read from its end, upside down: so read, a loss that falls still does, and dips are no nearer than spikes.

    Args:
        loss, corrupted_rows: see `loss_spikes`.
    """
    spiked = {
        at for spike in loss_spikes(loss, corrupted_rows) for at in range(spike.start, spike.start + spike.length)
    }
    return len(loss_spikes(-loss[::-1], {len(loss) - 1 - at for at in {*corrupted_rows, *spiked}}))


def least_spike(loss: np.ndarray, corrupted_rows: Collection[int] = ()) -> float:
    """Return by how many nats a loss has to jump to be a spike: what it is below the limit, at the median step.

    Args:
        loss, corrupted_rows: see `loss_spikes`.

    Returns:
        NaN for a run too short to be judged.
    """
    limits = _limits(loss, corrupted_rows, SPIKE_WINDOW, SPIKE_SIGMAS)
    room = limits - loss
    normal = [
        step for step in range(len(loss)) if np.isfinite(room[step]) and room[step] >= 0 and step not in corrupted_rows
    ]
    return float(np.median(room[normal])) if normal else float("nan")


def _limits(loss: np.ndarray, corrupted_rows: Collection[int], window: int, sigmas: float) -> np.ndarray:
    """Return the highest loss of each step that is no spike; infinite where too few steps came before to judge.

    Spikes, dips, and how far a loss has to jump are asked for by several tables and verdicts: what was found is kept.
    """
    return _limits_of(np.asarray(loss, dtype=np.float64).tobytes(), frozenset(corrupted_rows), window, sigmas)


@lru_cache(maxsize=1 << 9)
def _limits_of(loss: bytes, corrupted_rows: frozenset[int], window: int, sigmas: float) -> np.ndarray:
    values = np.frombuffer(loss).tolist()
    normal: list[float] = []
    limits = np.full(len(values), np.inf)
    for step, value in enumerate(values):
        if step in corrupted_rows:
            continue
        recent = np.array(normal[-window:])
        if len(recent) == window:
            median = np.median(recent)
            limits[step] = median + sigmas * 1.4826 * np.median(np.abs(recent - median))
        if np.isfinite(value) and value <= limits[step]:
            normal.append(value)
    limits.flags.writeable = False
    return limits


def spike_score(values: np.ndarray, corrupted_rows: Collection[int] = ()) -> float:
    """Return the share of values at least seven standard deviations from the mean of those before, as OLMo 2 counts.

    Mean and deviation are those of the last 1,000 values (arXiv 2501.00656, Section 3.1), as many as there are in
    shorter runs, and 50 at least: earlier values are not judged. A value that is not finite counts as such a one, and
    enters no mean.

    Args:
        values: (steps,) losses or norms.
        corrupted_rows: indices of steps to pass over, those of bad batches.

    Returns:
        From 0 to 1; NaN if no value can be judged.
    """
    kept = [value for step, value in enumerate(values.tolist()) if step not in corrupted_rows]
    before: list[float] = []
    judged = odd = 0
    for value in kept:
        recent = np.array(before[-SCORE_WINDOW:])
        if len(recent) >= SCORE_LEAST:
            judged += 1
            odd += not abs(value - recent.mean()) < SCORE_SIGMAS * recent.std()
        if np.isfinite(value):
            before.append(value)
    return odd / judged if judged else float("nan")


def diverged(loss: np.ndarray) -> bool:
    """Return whether a run ended far above where it had been.

    It has diverged if the mean loss of its last tenth is not finite, or more than 0.5 nats above the lowest mean of as
    many steps in a row.

    Args:
        loss: (steps,) training loss of each step.
    """
    length = max(1, len(loss) // 10)
    if not np.isfinite(loss[-length:]).all():
        return True
    means = _running_mean(np.where(np.isfinite(loss), loss, np.inf), length)
    return bool(means[-1] > means.min() + DIVERGED)


def tokens_to_reach(loss: np.ndarray, tokens: np.ndarray, target: float) -> float | None:
    """Return the tokens after which the loss, as the mean of 20 steps, is first at most a target; `None`: it never is.

    Means of the same losses that differ by rounding are the same.

    Args:
        loss: (steps,) training loss of each step.
        tokens: (steps,) processed after each.
        target: in nats.
    """
    length = min(REACHED_WINDOW, len(loss))
    means = _running_mean(np.where(np.isfinite(loss), loss, np.inf), length)
    reached = np.flatnonzero(means <= target + 1e-12 * abs(target))
    return float(tokens[reached[0] + length - 1]) if len(reached) else None


def excursion(loss: np.ndarray, undisturbed: np.ndarray, bad: Collection[int]) -> float:
    """Return how far a loss is above that of the same run undisturbed after bad batches, in nats.

    It is the mean over the 10 steps after each, up to the next, and over the bad batches.

    Args:
        loss, undisturbed: (steps,) of runs that see the same batches but for the bad ones.
        bad: indices of the bad batches' steps.
    """
    ends = followed(bad, len(loss))
    means = [float(np.mean((loss - undisturbed)[at + 1 : min(at + 1 + EXCURSION, end)])) for at, end in ends]
    return float(np.mean(means))


def lost_batches(undisturbed: np.ndarray, bad: Collection[int]) -> float:
    """Return the excursion of a run that ignored bad batches: it has learnt from fewer, and its loss is where it was.

    After the n-th bad batch it is n steps behind, each of which lowers the loss by the slope of a straight line through
    the 50 steps around (from 25 before to 24 after, as far as there are any). It is the mean over the same bad batches
    as that of `excursion`, or 0 where the loss rises. Part of the slope can be the learning rate's decay, which such a
    run would not be behind in: the cost is rather less.

    Args:
        undisturbed: (steps,) loss of the run without bad batches.
        bad: indices of the bad batches' steps.

    Returns:
        Nats; NaN where a loss around is not finite.
    """
    costs = []
    for at, _ in followed(bad, len(undisturbed)):
        first = max(0, at - SLOPE_WINDOW // 2)
        around = undisturbed[first : at + SLOPE_WINDOW // 2]
        slope = float(np.polyfit(np.arange(len(around)), around, 1)[0]) if np.isfinite(around).all() else np.nan
        costs.append(-slope * sum(step <= at for step in bad))
    return float(np.maximum(0.0, np.mean(costs)))


def recovery(loss: np.ndarray, undisturbed: np.ndarray, bad: Collection[int]) -> float:
    """Return how many steps after a bad batch a loss is as if it had not been, on the mean over the bad batches.

    It is where the mean of 5 steps is first within 0.05 nats of the undisturbed run's, counted to the first of them;
    for a run that does not get there before the next bad batch, or its end, all the steps until then.

    Args:
        loss, undisturbed, bad: see `excursion`.
    """
    steps = []
    for at, end in followed(bad, len(loss)):
        above = (loss - undisturbed)[at + 1 : end]
        length = min(RECOVERED_WINDOW, len(above))
        there = np.flatnonzero(_running_mean(above, length) <= RECOVERED)
        steps.append(int(there[0]) if len(there) else len(above))
    return float(np.mean(steps))


def followed(bad: Collection[int], steps: int) -> list[tuple[int, int]]:
    """Return of each bad batch that steps follow its index, and that of the next one, or the number of steps."""
    return [(at, end) for at, end in pairwise([*sorted(bad), steps]) if end > at + 1]


def _running_mean(values: np.ndarray, length: int) -> np.ndarray:
    """Return the means of `length` values in a row, the first of the first ones."""
    return np.lib.stride_tricks.sliding_window_view(values, length).mean(axis=1)
