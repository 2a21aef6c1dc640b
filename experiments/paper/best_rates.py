"""The best learning rate of a strategy, estimated between the rates of a grid."""

import math
from collections.abc import Mapping

import numpy as np

from experiments.paper.tables_and_figures import RATES
from experiments.run.collect import RunCollection


def best_rates(collection: RunCollection, group: str) -> dict[int, float]:
    """Return the best learning rate of `fixed` or `zclip` by seed, of seeds that have all; 0 if all have diverged.

    It is that of the lowest train loss, see `lowest_between`. A run that has diverged has none.
    """
    best = {}
    for seed in collection.complete_seeds([specs[group] for specs in RATES.values()]):
        losses = {
            lr: math.inf
            if (loss := collection.runs[specs[group], seed].result.get("train_loss")) is None
            or (specs[group], seed) in collection.diverged
            else loss
            for lr, specs in RATES.items()
        }
        best[seed] = lowest_between(losses)
    return best


def lowest_between(losses: Mapping[float, float]) -> float:
    """Return the rate at which a loss is lowest, by its values at three rates of a grid; 0 if no value is finite.

    It is the vertex of the parabola over log rates, through the lowest value and its two neighbours. Where there are
    no two finite neighbours, as at the ends of the grid, it is the rate of the lowest value.
    """
    rates = sorted(losses)
    values = np.array([losses[rate] for rate in rates])
    if not np.isfinite(values).any():
        return 0.0
    at = int(np.argmin(values))
    if not 0 < at < len(rates) - 1 or not np.isfinite(values[at - 1 : at + 2]).all():
        return rates[at]
    around = np.log(rates[at - 1 : at + 2])
    curvature, slope, _ = np.polyfit(around - around[1], values[at - 1 : at + 2], 2)
    return rates[at] if curvature <= 0 else float(np.exp(around[1] - slope / (2 * curvature)))
