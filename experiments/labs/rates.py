"""How an arm of a rate lab depends on the learning rate: curves, sensitivity, and the comparison with the reference.

Learning-rate sensitivity is that of Wortsman et al. (arXiv 2309.14322): the mean over the learning rates
of the final loss above the best of the arm, where a loss counts at most as much as that of the untrained model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.labs.declaration import Arm, RateLab
from experiments.labs.statistics import Comparison, differences
from experiments.run.collect import RunCollection
from experiments.run.read import Run

#: A rate is usable if its loss is at most this much above the best of all arms, in nats.
USABLE = 0.1


class Curve(NamedTuple):
    """The runs of one arm and one seed at all rates.

    Attributes:
        losses: (rates,) final test loss in nats, at most that of the untrained model.
        sensitivity: mean of these losses above the lowest, in nats.
    """

    losses: np.ndarray
    sensitivity: float

    @property
    def mean_loss(self) -> float:
        """Mean of the losses over the rates, in nats."""
        return float(self.losses.mean())


class RateResult(NamedTuple):
    """The runs of an arm.

    Attributes:
        arm: the arm.
        curves: by seed, of the seeds that have all rates.
        comparison: of its sensitivity with the reference arm's; `None` for the reference, and for too few seeds.
        loss_comparison: that of its mean loss over the rates; `None` as for `comparison`.
    """

    arm: Arm
    curves: Mapping[int, Curve]
    comparison: Comparison | None
    loss_comparison: Comparison | None

    @property
    def sensitivities(self) -> list[float]:
        """Sensitivity of each seed, in nats."""
        return [curve.sensitivity for curve in self.curves.values()]

    @property
    def seed_losses(self) -> list[float]:
        """Mean loss over the rates of each seed, in nats."""
        return [curve.mean_loss for curve in self.curves.values()]

    @property
    def mean_losses(self) -> np.ndarray:
        """(rates,) mean loss over seeds."""
        return np.mean([curve.losses for curve in self.curves.values()], axis=0)


def final_loss(run: Run) -> float:
    """Return the test loss of a finished run, at most the first loss of its training."""
    untrained = float(run.metrics["loss"][0])
    loss = run.result.get("test_loss")
    return untrained if loss is None or not math.isfinite(loss) else min(float(loss), untrained)


def curves_of(lab: RateLab, arm: Arm, collection: RunCollection) -> dict[int, Curve]:
    """Return the curve of each seed that has all rates."""
    specs = [lab.at(arm, rate) for rate in lab.rates]
    curves = {}
    for seed in collection.complete_seeds(specs):
        losses = np.array([final_loss(collection.runs[spec, seed]) for spec in specs])
        curves[seed] = Curve(losses, float(np.mean(losses - losses.min())))
    return curves


def usable_rates(lab: RateLab, losses: np.ndarray, best: float) -> Sequence[float]:
    """Return the learning rates whose loss is at most 0.1 nats above `best`."""
    return [rate for rate, loss in zip(lab.rates, losses, strict=True) if loss <= best + USABLE]


def rate_results(lab: RateLab, collection: RunCollection) -> list[RateResult]:
    """Return the results of the arms that have all rates of a seed, in the lab's order."""
    curves = {arm: by_seed for arm in lab.arms if (by_seed := curves_of(lab, arm, collection))}
    sensitivities = {arm.label: {seed: each.sensitivity for seed, each in by.items()} for arm, by in curves.items()}
    means = {arm.label: {seed: each.mean_loss for seed, each in by.items()} for arm, by in curves.items()}
    changes, losses = (differences(values, lab.reference) for values in (sensitivities, means))
    return [RateResult(arm, by_seed, changes.get(arm.label), losses.get(arm.label)) for arm, by_seed in curves.items()]
