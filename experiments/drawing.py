"""How the paper's figures look: colours, dashes, smoothing, and lines of several seeds.

Of several seeds a line is the mean, and a band goes from the lowest to the highest. Colours are told apart by the
colour-blind, lines by their dashes too; the background is white everywhere. What is smoothed says so.
"""

import textwrap
from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.catalogue import Setting
from experiments.collection import Found
from experiments.runs import Run, bad_batches, without_bad

matplotlib.rcParams["svg.hashsalt"] = "zclip"  # the same figure is the same file

#: Okabe and Ito's colours, but for the yellow; black last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")

#: Of what stands below a figure, in an inch.
CHARACTERS = 16

#: Of the steps, the share whose mean is drawn for one.
SMOOTHED = 1 / 60


class NothingToDraw(ValueError):
    """No run of a figure is done."""


def runs_of(found: Found, setting: Setting) -> list[Run]:
    """Return the runs of a setting that are done, by seed."""
    return [run for (other, _), run in sorted(found.runs.items(), key=lambda pair: pair[0][1]) if other == setting]


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return means around each value over a number of steps, which is the other result; the ends have fewer."""
    width = max(1, round(len(values) * SMOOTHED)) // 2 * 2 + 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same"), width


def line(ax: Axes, runs: Sequence[Run], column: str, label: str, number: int, smoothed: bool = True) -> str:
    """Draw a column of some seeds, and return what was done to it."""
    drawn, said = [], ""
    for run in runs:
        values = without_bad(run, column) if column == "loss" else run.metrics[column]
        if smoothed:
            values, width = smooth(values)
            said = f"mean of {width} steps"
        drawn.append(values)
    length = max(map(len, drawn))
    rows = np.array([np.pad(values, (0, length - len(values)), constant_values=np.nan) for values in drawn])
    step = max((run.metrics["step"] for run in runs), key=len)
    colour = COLOURS[number % len(COLOURS)]
    if len(rows) > 1:
        ax.fill_between(step, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.18, lw=0)
    ax.plot(step, rows.mean(axis=0), color=colour, ls=DASHES[number % len(DASHES)], lw=1.3, label=label)
    return said


def mark_bad(ax: Axes, runs: Iterable[Run]) -> None:
    """Mark the steps at which bad batches were put in."""
    for number, step in enumerate(sorted({step for run in runs for step in bad_batches(run)})):
        ax.axvline(step, color="0.55", lw=0.7, ls=":", zorder=0, label="bad batch put in" if number == 0 else None)


def finished(figure: Figure, title: str, said: str, runs: Sequence[Run], notes: Sequence[str] = ()) -> Figure:
    """Give a figure its title, grid, what its horizontal axis is, and lines on the runs that it shows.

    Args:
        figure: with its axes.
        title: above it.
        said: what was done to the values.
        runs: that it shows.
        notes: on runs that it should show, and does not; or that have diverged.
    """
    figure.suptitle(title, fontsize=11)
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.margins(x=0.01)
    axis = f"step ({said})\n" if said else ""
    width = round(figure.get_figwidth() * CHARACTERS)
    lines = [textwrap.fill(line, width) for line in (*_about(runs).splitlines(), *notes)]
    figure.supxlabel(axis + "\n".join(lines), fontsize=8)
    return figure


def _about(runs: Sequence[Run]) -> str:
    """Say what the runs of a figure have in common."""
    config = runs[0].config
    seeds = sorted({run.config["seed"] for run in runs})
    times = config["evidence"]["lr_times"]
    said = f"{config['evidence']['scale']} scale, {config['model']['name']}, seed{'s' * (len(seeds) > 1)} "
    said += ", ".join(map(str, seeds))
    said += f"; learning rates are {times:g} times those named" if times != 1 else ""
    rest = ["a line is the mean over seeds, its band from lowest to highest"] if len(seeds) > 1 else []
    if any(map(bad_batches, runs)):
        rest.append("losses of bad batches are left out")
    return f"{said}\n{'; '.join(rest)}" if rest else said
