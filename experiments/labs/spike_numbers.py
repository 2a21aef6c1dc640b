"""The numbers of a run of a lab on spikes."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from experiments.labs.natural_spikes import FIRST, NaturalSpike, after_calm, natural_spikes, total_area, warning_steps
from experiments.run.read import Run

#: Number of steps at the end whose mean is the final loss.
FINAL_STEPS = 200
#: Steps before one whose median is the level that its excess is above, and the multiple of that level.
EXCESS_WINDOW, EXCESS_ABOVE = 500, 1.3
#: Scale of the rate below which a step is taken at a lower rate than that of the schedule.
SLOWED = 0.99
#: Columns of metrics.jsonl that may warn of a spike, with their names in tables.
SIGNALS = {"grad_norm": "gradient norm", "update_norm": "update norm", "loss": "loss"}


class SpikeNumbers(NamedTuple):
    """The spikes of a run, and what else its table shows.

    Attributes:
        spikes: the spikes.
        per_10k: spikes in 10,000 steps.
        area: sum over the spikes of the loss above their level, in nats x steps; infinite if a loss is not finite, or
            the run has diverged.
        excess: sum of the loss minus its level over the steps at more than 1.3 times the level, in nats x steps, with
            or without a spike; infinite as the area is.
        steps_lost: number of steps in spikes.
        worst: highest loss as a multiple of the level before it; 1 without a spike.
        mean_loss: mean over the steps after the first 200, in nats; NaN if there are none.
        final_loss: mean over the last 200 steps, in nats.
        clipped: share of steps whose gradients were scaled, or skipped.
        slowed: share of steps that a rule over updates took below 0.99 of the rate of the schedule; NaN without a rule.
        scale: mean scale of the rate from the first such step on; 1 if there is none, NaN without a rule.
    """

    spikes: list[NaturalSpike]
    per_10k: float
    area: float
    excess: float
    steps_lost: int
    worst: float
    mean_loss: float
    final_loss: float
    clipped: float
    slowed: float
    scale: float


def spike_numbers(run: Run, has_diverged: bool = False) -> SpikeNumbers:
    """Return the numbers of a run; `has_diverged` says whether it ended far above its lowest loss."""
    loss = run.metrics["loss"]
    loss = np.where(np.isfinite(loss), loss, np.inf)
    spikes = natural_spikes(loss)
    scale = run.metrics.get("update_scale")
    return SpikeNumbers(
        spikes,
        per_10k=1e4 * len(spikes) / max(1, len(loss) - FIRST),
        area=total_area(spikes, has_diverged),
        excess=math.inf if has_diverged else excess(loss),
        steps_lost=sum(spike.length for spike in spikes),
        worst=max((spike.height for spike in spikes), default=1.0),
        mean_loss=float(loss[FIRST:].mean()) if len(loss) > FIRST else np.nan,
        final_loss=float(loss[-FINAL_STEPS:].mean()),
        clipped=float(np.mean(run.metrics["clipped"] > 0)),
        slowed=float(np.mean(scale < SLOWED)) if scale is not None else np.nan,
        scale=_mean_from_first(scale) if scale is not None else np.nan,
    )


def excess(loss: np.ndarray) -> float:
    """Return the sum of the loss minus its level, in nats x steps, over the steps at more than 1.3 times the level.

    The level of a step is the median of the 500 steps before it, or of as many as there are. The first 200 steps do not
    count. A spike must be twice its level and 0.1 nats above it; bumps below that count here.
    """
    if not np.isfinite(loss[FIRST:]).all():
        return math.inf
    before = np.concatenate([np.full(EXCESS_WINDOW, np.nan), loss[:-1]])
    levels = np.nanmedian(sliding_window_view(before, EXCESS_WINDOW)[FIRST : len(loss)], axis=1)
    above = loss[FIRST:] > EXCESS_ABOVE * levels
    return float((loss[FIRST:] - levels)[above].sum())


def _mean_from_first(scale: np.ndarray) -> float:
    """Return the mean of scales, (steps,), from the first one below 0.99 on; 1 if there is none."""
    slowed = np.flatnonzero(scale < SLOWED)
    return float(np.nanmean(scale[slowed[0] :])) if len(slowed) else 1.0


def warnings_of(run: Run) -> list[Mapping[str, int]]:
    """Return how many steps each signal of a run warns before each of its spikes, see `warning_steps`.

    Spikes with too few calm steps before them are left out, such as one soon after another.
    """
    found = []
    for spike in after_calm(natural_spikes(run.metrics["loss"])):
        steps = {name: warning_steps(run.metrics[name], spike.start) for name in SIGNALS if name in run.metrics}
        found.append({name: value for name, value in steps.items() if value is not None})
    return [each for each in found if each]
