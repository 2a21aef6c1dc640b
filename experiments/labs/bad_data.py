"""What bad batches cost an arm: its losses compared with those of the same arm and seed without bad batches.

Both runs are the same until the first bad batch, and see the same other batches after it. So the difference of their
losses is what bad batches did. What the arm itself costs shows in the run without them, against the reference arm's.
A loss counts at most as much as that of the untrained model, also where it is not finite.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.labs.declaration import Arm, BadDataLab, arm_of
from experiments.labs.rates import final_loss
from experiments.labs.statistics import Comparison, differences
from experiments.run.collect import RunCollection
from experiments.run.definitions import EXCESS_WINDOW, corrupted_spans, skip_cost
from experiments.run.read import Run, corruption_kinds

#: Number of steps before a bad batch whose mean difference is what earlier ones have left.
LEFT = 5
#: Difference of excess losses, in nats, from which an arm raises or lowers it.
SMALLEST_EXCESS = 0.02
#: Difference of test losses without bad batches, in nats, from which an arm raises or lowers it.
SMALLEST_COST = 0.005


class BadDataNumbers(NamedTuple):
    """The numbers of a run, in nats unless said otherwise.

    Attributes:
        excess: mean difference over the 10 steps after a bad batch, or up to the next one.
        skip_cost: what the excess would be for a run that skips exactly the bad batches, see
            `experiments.run.definitions.skip_cost`.
        rise_of: mean of the same over bad batches of a kind, minus the mean difference over the last 5 other steps
            before each: what earlier bad batches have left does not count.
        area: sum of the differences over all other steps from the first bad batch on, in nats x steps.
        final: test loss minus that without bad batches.
        cost: test loss without bad batches, minus the same of the reference arm.
        recognised: share of the bad batches on which the arm acted: it clipped or skipped the step, lowered the
            learning rate, or masked sequences.
        acted: share of all steps on which it acted without bad batches.
    """

    excess: float
    skip_cost: float
    rise_of: Mapping[str, float]
    area: float
    final: float
    cost: float
    recognised: float
    acted: float


def bad_data_numbers(run: Run, clean: Run, reference: Run) -> BadDataNumbers:
    """Return the numbers of a run.

    `clean` is the run of the same arm and seed without bad batches, and `reference` that of the reference arm.
    """
    kinds = {step - 1: kind for step, kind in corruption_kinds(run).items()}
    bad = np.zeros(len(run.metrics["loss"]), dtype=bool)
    bad[list(kinds)] = True
    difference = bounded_losses(run) - bounded_losses(clean)
    means = {at: float(difference[at + 1 : min(at + 1 + EXCESS_WINDOW, end)].mean()) for at, end in spans(bad)}
    rises = {at: mean - float(difference[np.flatnonzero(~bad[:at])[-LEFT:]].mean()) for at, mean in means.items()}
    return BadDataNumbers(
        excess=_mean([*means.values()]),
        skip_cost=skip_cost(bounded_losses(clean), set(kinds)),
        rise_of={
            kind: _mean([rises[at] for at in rises if kinds[at] == kind])
            for kind in sorted({kinds[at] for at in rises})
        },
        area=float(difference[~bad].sum()),
        final=final_loss(run) - final_loss(clean),
        cost=final_loss(clean) - final_loss(reference),
        recognised=float(has_acted(run)[bad].mean()),
        acted=float(has_acted(clean).mean()),
    )


def has_acted(run: Run) -> np.ndarray:
    """Return for each step whether the arm acted: clipped, skipped, lowered the learning rate, or masked: (steps,)."""
    columns = ("clipped", "update_clipped", "masked_rows")
    return np.logical_or.reduce([run.metrics[name] > 0 for name in columns if name in run.metrics])


def spans(bad: np.ndarray) -> list[tuple[int, int]]:
    """Return the index of each bad batch before another step, and of the next bad batch or the end of the run."""
    return corrupted_spans(set(np.flatnonzero(bad).tolist()), len(bad))


def bounded_losses(run: Run) -> np.ndarray:
    """Return the losses of a run, each at most the first one: (steps,) in nats."""
    loss = run.metrics["loss"]
    return np.minimum(np.where(np.isfinite(loss), loss, np.inf), loss[0])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else np.nan


class BadDataResult(NamedTuple):
    """The runs of an arm.

    Attributes:
        arm: the arm.
        numbers: numbers of each seed that has both runs of the arm, and the reference arm's without bad batches.
        comparison: of its excess losses with the reference arm's; `None` for the reference, and for too few seeds.
        cost: its costs, compared with none; `None` as for `comparison`.
    """

    arm: Arm
    numbers: Mapping[int, BadDataNumbers]
    comparison: Comparison | None
    cost: Comparison | None

    def mean_rise(self, kind: str) -> float:
        """Return the mean rise after bad batches of a kind over seeds, in nats; NaN if no seed has any."""
        return _mean([each.rise_of[kind] for each in self.numbers.values() if kind in each.rise_of])


def bad_data_results(lab: BadDataLab, collection: RunCollection) -> list[BadDataResult]:
    """Return the results of the arms that have both runs of a seed, and the reference arm's, in the lab's order."""
    reference = lab.clean(arm_of(lab.arms, lab.reference))
    numbers: dict[Arm, dict[int, BadDataNumbers]] = {}
    for arm in lab.arms:
        clean = lab.clean(arm)
        for seed in collection.complete_seeds([arm, clean, reference]):
            runs = (collection.runs[spec, seed] for spec in (arm, clean, reference))
            numbers.setdefault(arm, {})[seed] = bad_data_numbers(*runs)
    excess = {arm.label: {seed: each.excess for seed, each in by.items()} for arm, by in numbers.items()}
    cost = {arm.label: {seed: each.cost for seed, each in by.items()} for arm, by in numbers.items()}
    changes = differences(excess, lab.reference, SMALLEST_EXCESS)
    costs = differences(cost, lab.reference, SMALLEST_COST)
    return [
        BadDataResult(arm, by_seed, changes.get(arm.label), costs.get(arm.label)) for arm, by_seed in numbers.items()
    ]
