"""The figure of a lab on changes in the middle of a run: loss, update norm and scale of the rate around the fork."""

from collections.abc import Iterator, Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments.labs.continued import compared_arms, fork_step
from experiments.labs.declaration import ContinuedLab
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.run.smoothing import MAX_SMOOTHED_STEPS, smooth
from experiments.run.style import draw_grid, draw_log_axis, label_styles

#: Steps before the fork that are shown.
BEFORE = 100
#: Difference of losses in nats above which its axis is logarithmic.
LINEAR = 0.1
#: The labels of the vertical axes, from top to bottom.
ROWS = ("loss (nats)", "loss minus that of\n{reference} (nats)", "update norm", "scale of the rate")


def draw_forks(lab: ContinuedLab, collection: RunCollection) -> Figure | None:
    """Return the runs of the first seed that has any, a column for each change; `None` if none is finished.

    Losses are means of up to 9 steps.
    """
    ways = compared_arms(lab)
    forked = [arm for arms in ways.values() for arm in arms.values()]
    seeds = [seed for seed in collection.seeds if any((arm, seed) in collection.runs for arm in forked)]
    if not seeds:
        return None
    styles = label_styles(list(dict.fromkeys(label for arms in ways.values() for label in arms)))
    size = (2.9 * len(ways), 9.2)
    figure, axes = plt.subplots(len(ROWS), len(ways), figsize=size, sharex=True, layout="constrained", squeeze=False)
    for row in axes[1:]:  # losses differ too much for one axis
        for ax in row[1:]:
            ax.sharey(row[0])
    for column, (name, arms) in enumerate(ways.items()):
        runs = {label: run for label, arm in arms.items() if (run := collection.runs.get((arm, seeds[0]))) is not None}
        for row, label, steps, values in _lines(runs, lab.reference):
            style = styles[label]
            axes[row, column].plot(steps, values, color=style.color, ls=style.dashes, lw=1.1, label=label)
        axes[0, column].set_title(name, fontsize=9)
        for row, ax in enumerate(axes[:, column]):
            ax.axvline(0, color="0.4", lw=0.9)
            _scale(ax, has_negative=row == 1)
    for row, text in enumerate(ROWS):
        axes[row, 0].set_ylabel(text.format(reference=lab.reference), fontsize=8)
    handles = [Line2D([], [], color=style.color, ls=style.dashes, label=label) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, handlelength=4)
    figure.supxlabel(
        f"steps from the fork, runs of seed {seeds[0]}; losses are means of {MAX_SMOOTHED_STEPS} steps, "
        f"differences above {LINEAR} are on a logarithmic scale",
        fontsize=9,
    )
    draw_grid(figure)
    return figure


def _lines(runs: Mapping[str, Run], reference: str) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Yield the lines of a column: row, label, steps from the fork and values."""
    for label, run in runs.items():
        step = fork_step(run)
        shown = slice(max(0, step - BEFORE), None)
        loss, other = run.metrics["loss"], runs[reference].metrics["loss"] if reference in runs else None
        rows = (
            _smooth_parts(loss, step),
            _smooth_parts(loss - other, step) if other is not None and label != reference else None,
            run.metrics.get("update_norm"),
            run.metrics.get("update_scale"),
        )
        for row, values in enumerate(rows):
            if values is not None:
                yield row, label, run.metrics["step"][shown] - step, values[shown]


def _smooth_parts(values: np.ndarray, step: int) -> np.ndarray:
    """Return means of values, (steps,), none of which has steps of both sides of the fork."""
    return np.concatenate([smooth(part)[0] for part in (values[:step], values[step:])])


def _scale(ax: Axes, has_negative: bool) -> None:
    """Make the vertical axis logarithmic, on both sides of 0 if values can be negative."""
    draw_log_axis(ax, 7)
    if has_negative:
        ax.axhline(0, color="0.4", lw=0.9)
        ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.5)
        ax.set_yticks([sign * size for sign in (-1, 1) for size in (0.05, 0.1, 0.3, 1, 3)] + [0])
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
