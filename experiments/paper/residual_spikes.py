"""What runs say of spikes: whether fixed clipping leaves them, and whether ZClip removes them.

Both are measured alike. Spikes are left where a run has diverged or has a loss that is not finite, or where the 95 %
interval of the spikes in a run beyond as many dips, or of the loss after bad batches, is above what is as good as none;
and none are left where no run has, and both intervals are within it. In between, neither is shown. Noise is taken to
make as many dips as spikes. The loss after bad batches is that above the undisturbed run's, beyond what a run that
ignored them would have lost by learning from fewer.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.paper.collect import Found
from experiments.paper.judging import (
    NOT_SUPPORTED,
    NOT_TESTABLE,
    SUPPORTED,
    Judged,
    at_rates,
    by_seed,
    named,
    require_whole,
    seeds_with_all,
)
from experiments.paper.measures import MEASURES
from experiments.paper.statistics import LEAST_SEEDS, TOO_FEW, Difference, NotTestable, difference, rate, said
from experiments.paper.suites import TABLES, Setting
from experiments.run.definitions import SPIKE_WINDOW, least_spike, loss_dips
from experiments.run.read import corrupted_rows

#: Spikes in a run, and nats above the undisturbed run after bad batches, that are as good as none.
FEW_SPIKES, LITTLE = 0.2, 0.02

GONE = "diverged, or with a loss that is not finite"


def _in_lab(label: str) -> Mapping[str, Setting]:
    return next(row.settings for row in TABLES["spike_lab"].rows if row.label == label)


def _after_bad(found: Found, label: str, measure: str = "excursion") -> dict[int, float]:
    """Return a number of a strategy's run with bad batches beside its undisturbed one, by seed."""
    settings = _in_lab(label)
    require_whole(found, [settings["good"]])
    return by_seed(found, measure, [(settings["bad"], settings["good"])])


class Rates(NamedTuple):
    """How many more spikes than dips there are in a run: ends of an interval of 95 % at least."""

    least: float
    most: float


class Left(NamedTuple):
    """What a strategy leaves of spikes.

    Attributes:
        gone: its runs that have diverged, or have a loss that is not finite, see `_is_gone`.
        spikes: more than dips, in its runs over all learning rates; `None` if fewer than three seeds have all.
        beyond: the loss after bad batches above the undisturbed run's, beyond what the lost batches cost; `None` if it
            is not known, or a run of the lab is gone.
        numbers: all of it in words.
    """

    gone: list[str]
    spikes: Rates | None
    beyond: Difference | None
    numbers: list[str]

    @property
    def known(self) -> bool:
        """Whether both were found."""
        return self.spikes is not None and self.beyond is not None

    @property
    def some(self) -> bool:
        """Whether spikes are left for sure."""
        return bool(
            self.gone
            or (self.spikes is not None and self.spikes.least > FEW_SPIKES)
            or (self.beyond is not None and self.beyond.least > LITTLE)
        )

    @property
    def none(self) -> bool:
        """Whether none are left for sure."""
        return (
            not self.gone
            and (self.spikes is not None and self.spikes.most <= FEW_SPIKES)
            and (self.beyond is not None and self.beyond.most <= LITTLE)
        )


def _left(found: Found, label: str, group: str) -> Left:
    """Return what a strategy leaves of spikes."""
    lab = _in_lab(label)
    over_rates = [row[group] for row in at_rates().values()]
    gone = {
        found.runs[setting, seed].path: named(setting, [seed])
        for setting in (*over_rates, lab["bad"], lab["good"])
        if sum((setting, seed) in found.runs for seed in found.seeds) >= LEAST_SEEDS
        for seed in found.seeds
        if _is_gone(found, setting, seed)
    }
    numbers = [f"{GONE}: {'; '.join(gone.values())}"] if gone else []
    spikes, counted = _counted(found, over_rates)
    in_lab = [
        named(setting, [seed]) for setting in lab.values() for seed in found.seeds if _is_gone(found, setting, seed)
    ]
    beyond, compared = (
        (None, [f"loss after bad batches: {GONE}: {'; '.join(in_lab)}"]) if in_lab else _beyond(found, label)
    )
    return Left([*gone.values()], spikes, beyond, [f"{label}: {words}" for words in (*numbers, counted, *compared)])


def _counted(found: Found, settings: Sequence[Setting]) -> tuple[Rates | None, str]:
    """Return the spikes in runs, those that have diverged included, of seeds that have all; and that in words."""
    whole = seeds_with_all(found, settings)
    runs = [found.runs[setting, seed] for setting in settings for seed in whole]
    counts = [MEASURES["spikes"].of(run, None) for run in runs]
    if len(whole) < LEAST_SEEDS or None in counts:
        why = "runs are too short to have any" if None in counts else TOO_FEW
        return None, f"spikes over all learning rates: {why}"
    up = rate(round(sum(count or 0 for count in counts)), len(runs))
    down = rate(sum(loss_dips(run.metrics["loss"], corrupted_rows(run)) for run in runs), len(runs))
    spikes = Rates(up.least - down.most, up.most - down.least)
    jump = float(np.nanmedian([least_spike(run.metrics["loss"], corrupted_rows(run)) for run in runs]))
    return spikes, (
        f"{up.events} spikes in {up.runs} runs over all learning rates, {up.least:.2f} to {up.most:.2f} in a run "
        f"(95 %, Poisson, as if runs of a seed were independent), and as far down {down.events} times, which noise can "
        f"do: {spikes.least:.2f} to {spikes.most:.2f} more spikes than dips; the first {SPIKE_WINDOW} steps can only "
        f"spike by not being finite, and after that a loss has to jump by {jump:.2f} nats (median)"
    )


def _beyond(found: Found, label: str) -> tuple[Difference | None, list[str]]:
    """Return the loss after bad batches beyond what the lost batches cost, and the number in words."""
    try:
        above, costs = _after_bad(found, label), _after_bad(found, label, "lost_batches")
        beyond = difference(above, costs)
    except NotTestable as why:
        return None, [f"loss after bad batches: {why}"]
    return beyond, [
        f"loss after bad batches minus the undisturbed run's, in nats: {difference(above).says()}, of which the lost "
        f"batches cost about {np.mean(list(costs.values())):.3f}; beyond that {beyond.least:.3f} to {beyond.most:.3f} "
        "(95 %)"
    ]


def _is_gone(found: Found, setting: Setting, seed: int) -> bool:
    """Whether a run has diverged or has a loss that is not finite, where it has bad batches after the first of them."""
    if (run := found.runs.get((setting, seed))) is None:
        return False
    bad = corrupted_rows(run)
    after = np.delete(run.metrics["loss"], sorted(bad))[min(bad, default=0) :]
    return (setting, seed) in found.diverged or not bool(np.isfinite(after).all())


def fixed_leaves_spikes(found: Found) -> Judged:
    """Judge whether fixed clipping leaves some."""
    left = _left(found, "Fixed 1.0", "fixed")
    if not left.some and not left.known:
        return NOT_TESTABLE, left.numbers
    rule = (
        f"rule: with 95 % there are more than {FEW_SPIKES:g} spikes in a run beyond dips, or more than {LITTLE:g} nats "
        "beyond what the lost batches cost, or a run has diverged or a loss that is not finite"
    )
    return SUPPORTED if left.some else NOT_SUPPORTED, [*left.numbers, rule]


def zclip_removes_spikes(found: Found) -> Judged:
    """Judge whether ZClip leaves none, where fixed clipping leaves some."""
    fixed = _left(found, "Fixed 1.0", "fixed")
    if not fixed.some:
        known = "it is not shown that" if fixed.known else "it is not known whether"
        raise NotTestable(f"{known} fixed clipping leaves any that could be removed")
    left = _left(found, "ZClip", "zclip")
    numbers = list(left.numbers)
    for label in ("Fixed 1.0", "No clipping"):
        less = said(lambda: difference(_after_bad(found, "ZClip"), _after_bad(found, label)))  # noqa: B023, at once
        numbers.append(f"that loss, ZClip minus {label}: {less}")
    numbers.append(
        f"rule: with 95 % there are at most {FEW_SPIKES:g} spikes in a run beyond dips, and at most {LITTLE:g} nats "
        "beyond what the lost batches cost, and no run has diverged or a loss that is not finite"
    )
    if not left.some and not left.known:
        return NOT_TESTABLE, numbers
    return SUPPORTED if left.none else NOT_SUPPORTED, numbers
