"""Spikes of runs whose batches are all alike: the loss of a run that memorises its text jumps to many times its level.

Losses and norms are (steps,) arrays. `experiments/run/definitions.py` counts spikes above the noise of a run on new
text. Here the loss falls a thousandfold, so levels are compared as ratios.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: Steps at the beginning in which the loss falls too steeply to have a level.
FIRST = 200
#: Number of preceding steps outside spikes whose median is the level.
WINDOW = 100
#: A spike begins at this many times the level, if that is at least so many nats above it.
BEGINS, BEGINS_NATS = 2.0, 0.1
#: A spike has ended below this many times the level.
ENDS = 1.3
#: Steps before a spike, first and last, that show the calm values of a signal.
CALM = (600, 100)
#: A signal warns this many robust standard deviations above its calm values, of its logarithm.
WARNS_SIGMAS = 5.0
#: Smallest standard deviation of a logarithm: 5 %.
MIN_SIGMA = 0.05
#: Steps below its limit that do not end a warning.
WARNING_GAP = 3


class NaturalSpike(NamedTuple):
    """A spike.

    Attributes:
        start: index of its first step.
        length: number of steps until the loss is back, or to the end of the run.
        level: median loss before it, in nats.
        height: highest loss, as a multiple of the level; infinite if a loss is not finite.
        area: sum over its steps of the loss above the level, in nats x steps; infinite if a loss is not finite.
    """

    start: int
    length: int
    level: float
    height: float
    area: float


def natural_spikes(loss: np.ndarray) -> list[NaturalSpike]:
    """Find the spikes of a run, in order.

    A spike begins where the loss is not finite, or twice its level and 0.1 nats above it. The level is the median of
    the last 100 steps outside spikes. The spike ends where the loss is below 1.3 times that level. The first 200 steps
    have no spikes.
    """
    spikes: list[NaturalSpike] = []
    normal = [value for value in loss[:FIRST].tolist() if np.isfinite(value)]
    step = FIRST
    while step < len(loss):
        level = float(np.median(normal[-WINDOW:])) if normal else np.inf
        if loss[step] <= max(BEGINS * level, level + BEGINS_NATS):
            normal.append(float(loss[step]))
            step += 1
            continue
        end = step + 1
        while end < len(loss) and not (loss[end] < ENDS * level or loss[end] == level):
            end += 1
        inside = np.where(np.isfinite(loss[step:end]), loss[step:end], np.inf)
        area = float(np.maximum(inside - level, 0).sum())
        height = float(inside.max()) / level if level > 0 else np.inf
        spikes.append(NaturalSpike(step, end - step, level, height, area))
        step = end
    return spikes


def total_area(spikes: Sequence[NaturalSpike], has_diverged: bool) -> float:
    """Return the area of all spikes of a run, in nats x steps; infinite if the run has diverged."""
    return math.inf if has_diverged else sum(spike.area for spike in spikes)


def after_calm(spikes: Sequence[NaturalSpike]) -> list[NaturalSpike]:
    """Return the spikes that have 600 steps between the end of the one before, or the first step, and them."""
    ends = [0, *(spike.start + spike.length for spike in spikes)]
    return [spike for spike, ended in zip(spikes, ends, strict=False) if spike.start - ended >= CALM[0]]


def calm_level(signal: np.ndarray, start: int) -> tuple[float, float] | None:
    """Return the median of a signal's calm values before a spike, and the limit above which it warns.

    `None` if too few steps precede the spike, see `warning_steps`.
    """
    if start < CALM[0]:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        calm = np.log(signal[start - CALM[0] : start - CALM[1]])
    calm = calm[np.isfinite(calm)]
    if len(calm) < WINDOW:
        return None
    median = float(np.median(calm))
    sigma = max(1.4826 * float(np.median(np.abs(calm - median))), MIN_SIGMA)
    return math.exp(median), math.exp(median + WARNS_SIGMAS * sigma)


def warning_steps(signal: np.ndarray, start: int) -> int | None:
    """Return how many steps before a spike a signal has begun to warn; 0 if it does so with the spike, or later.

    A signal, such as the gradient norm, warns where it is above its calm values by five robust standard deviations of
    its logarithm. Its calm values are those of 600 to 100 steps before the spike. The warning that counts is the one
    that lasts to the spike: up to 3 steps below the limit do not end it. `None` if too few steps precede the spike.
    """
    if (level := calm_level(signal, start)) is None:
        return None
    warns = signal[: start + 1] > level[1]
    first, gap = start, 0
    for step in range(start, start - CALM[1], -1):
        gap = 0 if warns[step] else gap + 1
        if gap > WARNING_GAP:
            break
        first = step if warns[step] else first
    return start - first
