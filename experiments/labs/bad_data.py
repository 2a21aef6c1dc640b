"""What bad batches cost a run: its losses compared with those of the run of the same seed without bad batches.

Both runs begin with the same weights and see the same other batches, so the difference of their losses is what bad
batches and the arm did. What the arm does without bad batches shows before the first of them. A loss counts at most as
much as that of the untrained model, also where it is not finite.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.labs.declaration import Arm, BadDataLab
from experiments.labs.rates import final_loss
from experiments.labs.statistics import Comparison, outcomes, paired_difference
from experiments.run.collect import RunCollection
from experiments.run.definitions import EXCESS_WINDOW, corrupted_spans
from experiments.run.read import Run, corruption_kinds

#: Number of steps before the first bad batch whose mean difference is what the arm does without bad batches.
BEFORE = 100
#: Number of steps before a bad batch whose mean difference is what earlier ones have left.
LEFT = 5
#: Difference of excess losses, in nats, from which an arm raises or lowers it.
SMALLEST_EXCESS = 0.02


class BadDataNumbers(NamedTuple):
    """The numbers of a run, in nats unless said otherwise.

    Attributes:
        before: mean difference from the clean run over the 100 steps before the first bad batch.
        excess: mean difference over the 10 steps after a bad batch, or up to the next one.
        rise_of: mean of the same over bad batches of a kind, minus the mean difference over the last 5 other steps
            before each: what earlier bad batches have left does not count.
        area: sum of the differences over all other steps from the first bad batch on, in nats x steps.
        final: test loss minus that of the clean run.
        recognised: share of the bad batches on which the arm acted: it clipped or skipped the step, lowered the
            learning rate, or masked sequences.
        clipped: the same share of all other steps.
    """

    before: float
    excess: float
    rise_of: Mapping[str, float]
    area: float
    final: float
    recognised: float
    clipped: float


def bad_data_numbers(run: Run, clean: Run) -> BadDataNumbers:
    """Return the numbers of a run; `clean` is the run of the same seed without clipping and bad batches."""
    kinds = {step - 1: kind for step, kind in corruption_kinds(run).items()}
    bad = np.zeros(len(run.metrics["loss"]), dtype=bool)
    bad[list(kinds)] = True
    difference = bounded_losses(run) - bounded_losses(clean)
    first = min(kinds)
    acted = has_acted(run)
    means = {at: float(difference[at + 1 : min(at + 1 + EXCESS_WINDOW, end)].mean()) for at, end in spans(bad)}
    rises = {at: mean - float(difference[np.flatnonzero(~bad[:at])[-LEFT:]].mean()) for at, mean in means.items()}
    return BadDataNumbers(
        before=float(difference[max(0, first - BEFORE) : first].mean()) if first else np.nan,
        excess=_mean([*means.values()]),
        rise_of={
            kind: _mean([rises[at] for at in rises if kinds[at] == kind])
            for kind in sorted({kinds[at] for at in rises})
        },
        area=float(difference[first:][~bad[first:]].sum()),
        final=final_loss(run) - final_loss(clean),
        recognised=float(acted[bad].mean()),
        clipped=float(acted[~bad].mean()),
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
        numbers: numbers of each seed that has a clean run.
        change: how its excess losses differ from the reference arm's; `None` for the reference, and for too few seeds.
        outcome: what it does to the excess loss, see `outcomes`; empty without a change.
    """

    arm: Arm
    numbers: Mapping[int, BadDataNumbers]
    change: Comparison | None
    outcome: str

    def mean_rise(self, kind: str) -> float:
        """Return the mean rise after bad batches of a kind over seeds, in nats; NaN if no seed has any."""
        return _mean([each.rise_of[kind] for each in self.numbers.values() if kind in each.rise_of])


def bad_data_results(lab: BadDataLab, collection: RunCollection) -> list[BadDataResult]:
    """Return the results of the arms that have a run and the clean one of its seed, in the lab's order."""
    numbers: dict[Arm, dict[int, BadDataNumbers]] = {}
    for arm in lab.arms:
        for seed in collection.complete_seeds([arm, lab.clean]):
            run, clean = collection.runs[arm, seed], collection.runs[lab.clean, seed]
            numbers.setdefault(arm, {})[seed] = bad_data_numbers(run, clean)
    excess = {arm.label: {seed: each.excess for seed, each in by_seed.items()} for arm, by_seed in numbers.items()}
    reference = excess.get(lab.reference, {})
    changes = {
        label: change
        for label, by_seed in excess.items()
        if label != lab.reference and (change := paired_difference(by_seed, reference, SMALLEST_EXCESS)) is not None
    }
    found = outcomes(changes)
    return [
        BadDataResult(arm, by_seed, changes.get(arm.label), found.get(arm.label, ""))
        for arm, by_seed in numbers.items()
    ]
