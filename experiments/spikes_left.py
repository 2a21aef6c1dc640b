"""What runs say of spikes: whether fixed clipping leaves them, and whether ZClip removes them.

Both are measured alike. Spikes are left where a run has diverged or has a loss that is not finite after bad batches, or
where the 95 % interval of the spikes in a run, or of the loss after bad batches, is above what is as good as none; and
none are left where no run has, and both intervals are within it. In between, neither is shown. The loss after bad
batches is that above the undisturbed run's, beyond what a run that ignored them would have lost by learning from fewer.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.catalogue import TABLES, Setting
from experiments.collection import Found
from experiments.definitions import SPIKE_WINDOW, least_spike
from experiments.judging import NOT_SUPPORTED, NOT_TESTABLE, SUPPORTED, Judged, at_rates, by_seed, named, require_whole
from experiments.measures import MEASURES
from experiments.paired import LEAST_SEEDS, TOO_FEW, Difference, Rate, Untestable, difference, rate, said
from experiments.runs import left_out

#: Spikes in a run, and nats above the undisturbed run after bad batches, that are as good as none.
FEW_SPIKES, LITTLE = 0.2, 0.02


def _in_lab(label: str) -> Mapping[str, Setting]:
    return next(row.settings for row in TABLES["spike_lab"].rows if row.label == label)


def _after_bad(found: Found, label: str, measure: str = "excursion") -> dict[int, float]:
    """Return a number of a strategy's run with bad batches beside its undisturbed one, by seed."""
    settings = _in_lab(label)
    require_whole(found, [settings["good"]])
    return by_seed(found, measure, [(settings["bad"], settings["good"])])


class Left(NamedTuple):
    """What a strategy leaves of spikes.

    Attributes:
        gone: its runs that have diverged, or have no finite loss after bad batches.
        spikes: in its runs over all learning rates; `None` if none is done.
        beyond: the loss after bad batches above the undisturbed run's, beyond what the lost batches cost; `None` if it
            is not known, or a run of the lab is gone.
        numbers: all of it in words.
    """

    gone: list[str]
    spikes: Rate | None
    beyond: Difference | None
    numbers: list[str]

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
    """Return what a strategy leaves of spikes.

    Raises:
        Untestable: there are fewer seeds than a verdict needs, or its undisturbed run has diverged.
    """
    if len(found.seeds) < LEAST_SEEDS:
        raise Untestable(TOO_FEW)
    lab = _in_lab(label)
    require_whole(found, [lab["good"]])
    over_rates = [row[group] for row in at_rates().values()]
    broken = {
        setting: [seed for seed in found.seeds if _is_gone(found, setting, seed)]
        for setting in dict.fromkeys([*over_rates, lab["bad"]])
    }
    gone = [named(setting, seeds) for setting, seeds in broken.items() if seeds]
    numbers = [f"diverged, or with a loss that is not finite: {'; '.join(gone)}"] if gone else []
    spikes, counted = _counted(found, over_rates)
    beyond, compared = (None, []) if broken[lab["bad"]] else _beyond(found, label)
    return Left(gone, spikes, beyond, [f"{label}: {words}" for words in (*numbers, counted, *compared)])


def _counted(found: Found, settings: Sequence[Setting]) -> tuple[Rate | None, str]:
    """Return the spikes in runs, those that have diverged included, and the number in words."""
    keys = [(setting, seed) for setting in settings for seed in found.seeds]
    runs = [found.runs[key] for key in keys if key in found.runs]
    counts = [count for run in runs if (count := MEASURES["spikes"].of(run, None)) is not None]
    if not counts:
        return None, "none of its runs over the learning rates is done, or long enough to count spikes"
    spikes = rate(round(sum(counts)), len(counts))
    jump = float(np.nanmedian([least_spike(run.metrics["loss"], left_out(run)) for run in runs]))
    return spikes, (
        f"{spikes.events} spikes in {spikes.runs} runs over all learning rates, {spikes.least:.2f} to "
        f"{spikes.most:.2f} in a run (95 %); the first {SPIKE_WINDOW} steps can only spike by not being finite, and "
        f"after that a loss has to jump by {jump:.2f} nats (median)"
    )


def _beyond(found: Found, label: str) -> tuple[Difference | None, list[str]]:
    """Return the loss after bad batches beyond what the lost batches cost, and the number in words."""
    try:
        above, costs = _after_bad(found, label), _after_bad(found, label, "lost_batches")
        beyond = difference(above, costs)
    except Untestable as why:
        return None, [f"loss after bad batches: {why}"]
    return beyond, [
        f"loss after bad batches minus the undisturbed run's, in nats: {difference(above).says()}, of which the lost "
        f"batches cost about {np.mean(list(costs.values())):.3f}; beyond that {beyond.least:.3f} to {beyond.most:.3f} "
        "(95 %)"
    ]


def _is_gone(found: Found, setting: Setting, seed: int) -> bool:
    """Whether a run has diverged, or has a loss that is not finite after its first bad batch."""
    if (run := found.runs.get((setting, seed))) is None:
        return False
    bad = left_out(run)
    after = np.delete(run.metrics["loss"], sorted(bad))[min(bad, default=len(run.metrics["loss"])) :]
    return (setting, seed) in found.diverged or not bool(np.isfinite(after).all())


def fixed_leaves_spikes(found: Found) -> Judged:
    """Judge whether fixed clipping leaves some."""
    left = _left(found, "Fixed 1.0", "fixed")
    if not left.some and (left.beyond is None or left.spikes is None):
        return NOT_TESTABLE, left.numbers
    rule = (
        f"rule: with 95 % there are more than {FEW_SPIKES:g} spikes in a run, or more than {LITTLE:g} nats beyond what "
        "the lost batches cost, or a run has diverged"
    )
    return SUPPORTED if left.some else NOT_SUPPORTED, [*left.numbers, rule]


def zclip_removes_spikes(found: Found) -> Judged:
    """Judge whether ZClip leaves none, where fixed clipping leaves some."""
    if not _left(found, "Fixed 1.0", "fixed").some:
        raise Untestable("fixed clipping leaves none for sure, so that there is nothing to remove")
    left = _left(found, "ZClip", "zclip")
    numbers = list(left.numbers)
    for label in ("Fixed 1.0", "No clipping"):
        less = said(lambda: difference(_after_bad(found, "ZClip"), _after_bad(found, label)))  # noqa: B023, at once
        numbers.append(f"that loss, ZClip minus {label}: {less}")
    numbers.append(
        f"rule: with 95 % there are at most {FEW_SPIKES:g} spikes in a run, and at most {LITTLE:g} nats beyond what "
        "the lost batches cost, and no run has diverged"
    )
    if not left.gone and (left.beyond is None or left.spikes is None):
        return NOT_TESTABLE, numbers
    return SUPPORTED if left.none else NOT_SUPPORTED, numbers
