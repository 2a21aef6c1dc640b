"""What verdicts on claims have in common: the words, and the numbers of runs by seed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from experiments.paper.collect import Found
from experiments.paper.measures import MEASURES, Reached, last_loss_reached
from experiments.paper.statistics import NotTestable
from experiments.paper.suites import LEARNING_RATES, TABLES, Setting

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable here"

#: A verdict and its numbers.
Judged = tuple[str, list[str]]
Judge = Callable[[Found], Judged]


def diverged_seeds(found: Found, setting: Setting) -> list[int]:
    """Return the seeds with which a setting has diverged."""
    return [seed for seed in found.seeds if (setting, seed) in found.diverged]


def seeds_with_all(found: Found, settings: Iterable[Setting]) -> list[int]:
    """Return the seeds of which the runs of all settings are done."""
    return sorted(set.intersection(*({seed for own, seed in found.runs if own == setting} for setting in settings)))


def named(setting: Setting, seeds: Sequence[int]) -> str:
    """Name runs as on the command line."""
    return " ".join([*setting.overrides, *([f"seed={','.join(map(str, seeds))}"] if seeds else [])])


def require_whole(found: Found, settings: Sequence[Setting]) -> None:
    """Raise `NotTestable` if a run of some settings has diverged."""
    for setting in settings:
        if gone := diverged_seeds(found, setting):
            raise NotTestable(f"a run that others are measured by has diverged: {named(setting, gone)}")


def by_seed(found: Found, measure: str, settings: Sequence[tuple[Setting, Setting | None]]) -> dict[int, float]:
    """Return the mean of a number over settings, each with its undisturbed one, by seed, of seeds that have all.

    Raises:
        NotTestable: a run that is done has no such number, or it is not finite: a mean over the others would leave out
            the worst.
    """
    values = {}
    for seed in found.seeds:
        own = []
        for setting, calm in settings:
            run, other = found.runs.get((setting, seed)), None if calm is None else found.runs.get((calm, seed))
            if run is None or (calm is not None and other is None):
                break
            value = MEASURES[measure].of(run, other)
            if value is None or not math.isfinite(value):
                beside = "" if calm is None else f", beside {named(calm, [])}"
                raise NotTestable(f"a run that is compared has no finite {measure}: {named(setting, [seed])}{beside}")
            own.append(value)
        else:
            values[seed] = float(np.mean(own))
    return values


def losses_by_seed(found: Found, measure: str, settings: Sequence[Setting]) -> dict[int, float]:
    """Return the mean loss over settings by seed; raise `NotTestable` if one has diverged."""
    require_whole(found, settings)
    return by_seed(found, measure, [(setting, None) for setting in settings])


def reached_by_seed(found: Found, fixed: Setting, zclip: Setting) -> dict[int, Reached]:
    """Return where ZClip is at the loss that fixed clipping ends with, by seed; nowhere if it has diverged.

    Raises:
        NotTestable: fixed clipping has diverged, or a loss that is not finite at its end.
    """
    require_whole(found, [fixed])
    reached = {}
    for seed in found.seeds:
        one, other = found.runs.get((fixed, seed)), found.runs.get((zclip, seed))
        if one is not None and other is not None:
            there = last_loss_reached(one, other)
            if not math.isfinite(there.loss):
                raise NotTestable(
                    f"a run that others are measured by has no finite loss at its end: {named(fixed, [seed])}"
                )
            reached[seed] = there._replace(tokens=None) if (zclip, seed) in found.diverged else there
    return reached


def at_rates() -> dict[float, Mapping[str, Setting]]:
    """Return the settings of Table 2, by the paper's learning rate and the strategy's name."""
    return {lr: row.settings for lr, row in zip(LEARNING_RATES, TABLES["table2"].rows, strict=True)}
