"""How the paper's figures look: colours, dashes, smoothing, and lines of several seeds.

Of several seeds a line is the mean, and a band goes from the lowest to the highest, where bands would not hide each
other. Colours are told apart by the colour-blind, lines by their dashes too; the background is white everywhere. What
is smoothed says so.
"""

import itertools
import textwrap
from collections.abc import Collection, Iterable, Sequence

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paper.collect import Found
from experiments.paper.suites import Setting
from experiments.run.read import Run, corrupted_rows, corrupted_steps

matplotlib.rcParams["svg.hashsalt"] = "zclip"  # the same figure is the same file

#: Okabe and Ito's colours, but for the yellow; black last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")

#: Of what stands below a figure, in an inch.
CHARACTERS = 16

#: Of the steps, the share whose mean is drawn for one, and how many steps that are at most: a spike is a few steps.
SMOOTHED, SMOOTHED_STEPS = 1 / 60, 9


class NothingToDraw(ValueError):
    """No run of a figure is done."""


def runs_of(found: Found, setting: Setting) -> list[Run]:
    """Return the runs of a setting that are done, by seed."""
    return [run for (other, _), run in sorted(found.runs.items(), key=lambda pair: pair[0][1]) if other == setting]


def smooth(values: np.ndarray, corrupted_rows: Collection[int] = ()) -> tuple[np.ndarray, int]:
    """Return means around each value over a number of steps, which is the other result.

    The ends have fewer, and so have both sides of what is left out, where there is no value: no mean is of steps before
    a bad batch and of such after it.
    """
    width = min(SMOOTHED_STEPS, max(1, round(len(values) * SMOOTHED)) // 2 * 2 + 1)
    smoothed = np.full(len(values), np.nan)
    edges = [-1, *sorted(corrupted_rows), len(values)]
    for before, after in itertools.pairwise(edges):
        if own := len(values[before + 1 : after]):
            kernel = np.ones(min(width, 2 * own - 1))
            counts = np.convolve(np.ones(own), kernel)
            centre = slice(len(kernel) // 2, len(kernel) // 2 + own)
            smoothed[before + 1 : after] = (np.convolve(values[before + 1 : after], kernel) / counts)[centre]
    return smoothed, width


def losses(ax: Axes, runs: Sequence[Run], label: str, number: int, band: bool = True) -> str:
    """Draw the losses of some seeds, those of bad batches left out, and return what was done to them."""
    rows, widths = zip(*(smooth(run.metrics["loss"], corrupted_rows(run)) for run in runs), strict=True)
    over_seeds(ax, rows, label, number, band)
    return f"mean of {widths[0]} steps around each"


def differences(ax: Axes, pairs: Sequence[tuple[Run, Run]], label: str, number: int) -> str:
    """Draw by how much one run's loss is above another's of the same seed, and return what was done to it."""
    above = [
        (run.metrics["loss"] - other.metrics["loss"], corrupted_rows(run) | corrupted_rows(other))
        for run, other in pairs
    ]
    rows, widths = zip(*(smooth(values, bad) for values, bad in above), strict=True)
    over_seeds(ax, rows, label, number)
    return f"mean of {widths[0]} steps around each"


def over_seeds(ax: Axes, rows: Sequence[np.ndarray], label: str, number: int, band: bool = True) -> None:
    """Draw the mean of some seeds, and how far they are apart.

    Args:
        ax: where.
        rows: (steps,) of each seed, from the first step on.
        label: in the legend.
        number: of the colour and the dashes.
        band: whether to draw how far the seeds are apart.
    """
    values = np.array(rows)
    step = np.arange(1, values.shape[1] + 1)
    colour = COLOURS[number % len(COLOURS)]
    if band and len(values) > 1:
        ax.fill_between(step, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, lw=0)
    ax.plot(step, values.mean(axis=0), color=colour, ls=DASHES[number % len(DASHES)], lw=1.3, label=label)


def mark_bad(ax: Axes, runs: Iterable[Run]) -> None:
    """Mark the steps at which bad batches were put in."""
    for number, step in enumerate(sorted({step for run in runs for step in corrupted_steps(run)})):
        ax.axvline(step, color="0.55", lw=0.7, ls=":", zorder=0, label="bad batch put in" if number == 0 else None)


def finished(
    figure: Figure, title: str, said: str, runs: Sequence[Run], notes: Sequence[str] = (), bands: bool = True
) -> Figure:
    """Give a figure its title, grid, what its horizontal axis is, and lines on the runs that it shows.

    Args:
        figure: with its axes.
        title: above it.
        said: what was done to the values.
        runs: that it shows.
        notes: on runs that it should show, and does not; or that have diverged; and what else to know.
        bands: whether it shows how far seeds are apart.
    """
    figure.suptitle(title, fontsize=11)
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.margins(x=0.01)
    axis = f"step ({said})\n" if said else ""
    width = round(figure.get_figwidth() * CHARACTERS)
    lines = [textwrap.fill(line, width) for line in (*_about(runs, bands), *notes)]
    figure.supxlabel(axis + "\n".join(lines), fontsize=8)
    return figure


def _about(runs: Sequence[Run], bands: bool) -> list[str]:
    """Say what the runs of a figure have in common, in a line or two."""
    config = runs[0].config
    seeds = sorted({run.config["seed"] for run in runs})
    times = config["paper"]["lr_scale"]
    said = f"{config['paper']['scale']} scale, {config['model']['name']}, seed{'s' * (len(seeds) > 1)} "
    said += ", ".join(map(str, seeds))
    said += f"; learning rates are {times:g} times those named" if times != 1 else ""
    if len(seeds) < 2:
        return [said]
    return [said, "a line is the mean over seeds" + (", a band goes from the lowest to the highest" if bands else "")]
