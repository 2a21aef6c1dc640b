"""Changes in the middle of a run: what clipping and rules over updates cost there, and what is done by hand.

A rule that was made for spikes acts when norms rise. Norms also rise for good reasons: other text begins, or a longer
context. Each arm has a base run, and a fork of it for each change. The mean loss of the steps after the fork is
compared with that of the reference arm after the same change, from its own base. A loss that is not finite counts as
that of the untrained model.

The claim was made before the runs: the brake costs at most 0.005 nats where norms rise for a good reason. With new text
or with a longer context, a mean loss that is shown to be more than 0.005 nats above the reference's refutes it. The
claim is supported if both differences are shown to be smaller. A rise on which the brake never acts does not test it.

A brake that begins at the fork has no statistics of the steps before. Its runs were declared after those of seed 0. The
recovery of the brake was made after the runs of seeds 0 to 2, in which the brake without it refuted the claim. Until
all runs were known, a loss counted at most as that of the untrained model. That hid a part of the brake's cost.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.labs.bad_data import has_acted
from experiments.labs.declaration import Arm, ContinuedLab, arm_of
from experiments.labs.statistics import EQUIVALENT, LOWERS, RAISES, Comparison, differences
from experiments.run.collect import RunCollection
from experiments.run.read import Run

#: Difference of mean losses, in nats, from which an arm raises or lowers it.
SMALLEST_COST = 0.005
#: Steps after the fork whose mean loss is also given.
EARLY = 100
#: Steps after the fork after which the scale of the rate is given.
SCALE_STEPS = (100, 500, 1000)
#: Scale from which on the rate has returned.
RETURNED = 0.9
#: What the runs say of the claim.
SUPPORTED, REFUTED, OPEN = "supported", "refuted", "undecided"


class ContinuedNumbers(NamedTuple):
    """The numbers of a run after its fork.

    Attributes:
        loss: mean loss in nats.
        early: the same of the first 100 steps.
        acted: share of the steps on which the strategy clipped or skipped, or the rule lowered the rate further.
        scales: scale of the rate after 100, 500 and 1,000 steps; NaN without a rule that scales it, or for fewer steps.
        lowest: lowest scale; NaN without such a rule.
        returned: steps until the scale has come back above 0.9 for good; 0 if it never left, infinite if it has not.
    """

    loss: float
    early: float
    acted: float
    scales: tuple[float, ...]
    lowest: float
    returned: float


def fork_step(run: Run) -> int:
    """Return the step after which a forked run begins; raise `ValueError` if it is none."""
    if run.fork_step is None:
        raise ValueError(f"{run.path.name} begins at its first step")
    return run.fork_step


def continued_numbers(run: Run) -> ContinuedNumbers:
    """Return the numbers of a forked run."""
    after = slice(fork_step(run), None)
    losses = run.metrics["loss"]
    loss, scale = np.where(np.isfinite(losses), losses, losses[0])[after], update_scales(run)[after]
    below = np.flatnonzero(scale < RETURNED)
    returned = float(below[-1] + 2) if len(below) else 0.0
    if np.isnan(scale).all():
        returned = math.nan
    elif returned > len(scale):
        returned = math.inf
    return ContinuedNumbers(
        loss=float(loss.mean()),
        early=float(loss[:EARLY].mean()),
        acted=float(has_acted(run)[after].mean()),
        scales=tuple(float(scale[step - 1]) if step <= len(scale) else math.nan for step in SCALE_STEPS),
        lowest=float(np.nanmin(scale)) if np.isfinite(scale).any() else math.nan,
        returned=returned,
    )


def update_scales(run: Run) -> np.ndarray:
    """Return the scale of the rate in each step, (steps,); NaN where no rule has one."""
    return run.metrics.get("update_scale", np.full(len(run.metrics["loss"]), np.nan))


class ContinuedResult(NamedTuple):
    """The runs of an arm after one change.

    Attributes:
        label: of the arm.
        is_control: whether it is no strategy.
        numbers: of each seed of which the reference has a run too.
        comparison: of its losses with the reference's; `None` for the reference, and for too few seeds.
    """

    label: str
    is_control: bool
    numbers: Mapping[int, ContinuedNumbers]
    comparison: Comparison | None


def compared_arms(lab: ContinuedLab) -> dict[str, dict[str, Arm]]:
    """Return the arms that are compared, by their labels, for each change; changes by hand come last."""
    ways = {name: lab.continued_arms(name) for name in lab.changes}
    unchanged = lab.continued(arm_of(lab.arms, lab.reference), lab.unchanged)
    by_hand = {arm.label: lab.from_reference(arm) for arm in lab.by_hand}
    return {**ways, "by hand": {lab.reference: unchanged, **by_hand}}


def continued_results(lab: ContinuedLab, collection: RunCollection) -> dict[str, list[ContinuedResult]]:
    """Return the results of the arms that have a run of a seed of the reference's, for each change."""
    found = {}
    for name, arms in compared_arms(lab).items():
        numbers: dict[str, dict[int, ContinuedNumbers]] = {}
        for label, arm in arms.items():
            for seed in collection.complete_seeds([arm, arms[lab.reference]]):
                numbers.setdefault(label, {})[seed] = continued_numbers(collection.runs[arm, seed])
        losses = {label: {seed: each.loss for seed, each in by.items()} for label, by in numbers.items()}
        changes = differences(losses, lab.reference, SMALLEST_COST)
        found[name] = [
            ContinuedResult(label, arms[label].is_control, by, changes.get(label)) for label, by in numbers.items()
        ]
    return found


def judge_brake(lab: ContinuedLab, results: Mapping[str, Sequence[ContinuedResult]]) -> str:
    """Return what the runs say of the claim that the brake costs at most 0.005 nats where norms should rise."""
    brakes = [result for name in lab.rises for result in results[name] if result.label == "brake"]
    found = [(result, result.comparison.outcome) for result in brakes if result.comparison is not None]
    if any(outcome == RAISES for _, outcome in found):
        return REFUTED
    acted = [outcome for result, outcome in found if any(each.acted > 0 for each in result.numbers.values())]
    shown = [outcome for outcome in acted if outcome in (EQUIVALENT, LOWERS)]
    return SUPPORTED if len(shown) == len(lab.rises) else OPEN
