"""Terms the paper leaves open, each defined once."""

from typing import NamedTuple

import numpy as np

#: Preceding steps that say what is normal.
SPIKE_WINDOW = 50
#: Robust standard deviations above their median that make a spike.
SPIKE_SIGMAS = 5.0


class Spike(NamedTuple):
    """One excursion of the loss: steps `start` to `start + length - 1`, counted from 0."""

    start: int
    length: int


def loss_spikes(loss: np.ndarray, window: int = SPIKE_WINDOW, sigmas: float = SPIKE_SIGMAS) -> list[Spike]:
    """Find the loss spikes of a run. The paper counts spikes without saying what one is; this is our definition.

    A step is in a spike if its loss is not finite, or more than `sigmas` robust standard deviations (1.4826 times
    the median absolute deviation) above the median of the last `window` steps that were in none. Steps in a
    row are one spike. The first `window` steps can only spike by not being finite.

    Args:
        loss: (steps,) training loss of each step.
        window: W above.
        sigmas: threshold.

    Returns:
        The spikes in order.
    """
    normal: list[float] = []
    spikes: list[Spike] = []
    for step, value in enumerate(loss.tolist()):
        recent = np.array(normal[-window:])
        high = not np.isfinite(value)
        if not high and len(recent) == window:
            median = np.median(recent)
            deviation = 1.4826 * np.median(np.abs(recent - median))
            high = value > median + sigmas * deviation
        if not high:
            normal.append(value)
        elif spikes and spikes[-1].start + spikes[-1].length == step:
            spikes[-1] = Spike(spikes[-1].start, spikes[-1].length + 1)
        else:
            spikes.append(Spike(step, 1))
    return spikes
