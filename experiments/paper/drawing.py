"""Drawing of losses, differences and several seeds, as the paper's figures share it.

A line is the mean over seeds. A band goes from the lowest to the highest seed, where bands would not hide each other.
Lines differ in colour and dashes. Captions say where values are smoothed.
"""

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.run.collect import seeds_text
from experiments.run.read import Run, corrupted_rows, corrupted_steps
from experiments.run.smoothing import smooth
from experiments.run.style import LineStyle, draw_grid

#: Characters per inch of the caption.
CHARACTERS_PER_INCH = 16


class NothingToDraw(ValueError):
    """No run of a figure is finished."""


def plot_losses(ax: Axes, runs: Sequence[Run], label: str, style: LineStyle, band: bool = True) -> str:
    """Plot the smoothed losses of several seeds, corrupted batches excluded, and return how they were smoothed."""
    smoothed = [smooth(run.metrics["loss"], corrupted_rows(run)) for run in runs]
    plot_seeds(ax, [row for row, _ in smoothed], label, style, band)
    return f"mean of {smoothed[0][1]} steps around each"


def plot_differences(ax: Axes, pairs: Sequence[tuple[Run, Run]], label: str, style: LineStyle) -> str:
    """Plot the loss of one run minus that of another with the same seed, and return how it was smoothed."""
    smoothed = [
        smooth(one.metrics["loss"] - other.metrics["loss"], corrupted_rows(one) | corrupted_rows(other))
        for one, other in pairs
    ]
    plot_seeds(ax, [row for row, _ in smoothed], label, style)
    return f"mean of {smoothed[0][1]} steps around each"


def pairs_by_seed(runs: Iterable[Run], others: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Return each run with the one of the other runs that has the same seed, if there is one."""
    by_seed = {run.config["seed"]: run for run in others}
    return [(run, by_seed[seed]) for run in runs if (seed := run.config["seed"]) in by_seed]


def plot_seeds(ax: Axes, rows: Sequence[np.ndarray], label: str, style: LineStyle, band: bool = True) -> None:
    """Plot the mean of several seeds, and their range if `band`."""
    values = np.array(rows)
    step = np.arange(1, values.shape[1] + 1)
    if band and len(values) > 1:
        ax.fill_between(step, values.min(axis=0), values.max(axis=0), color=style.color, alpha=0.18, lw=0)
    ax.plot(step, values.mean(axis=0), color=style.color, ls=style.dashes, lw=1.3, label=label)


def scale_by_logarithm(ax: Axes) -> None:
    """Make the vertical axis logarithmic, unless no line has a value above 0: matplotlib cannot draw that."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    if (values > 0).any():
        ax.set_yscale("log")


def mark_corrupted(ax: Axes, runs: Iterable[Run]) -> None:
    """Mark the steps with corrupted batches."""
    for number, step in enumerate(sorted({step for run in runs for step in corrupted_steps(run)})):
        label = "corrupted batch" if number == 0 else None
        ax.axvline(step, color="0.55", lw=0.7, ls=":", zorder=0, label=label)


def finish_figure(
    figure: Figure, title: str, axis_note: str, runs: Sequence[Run], notes: Sequence[str], bands: bool = True
) -> Figure:
    """Add title, grid, the label of the horizontal axis and the caption to a figure, and return it.

    `axis_note` says how values were processed, and is empty for a horizontal axis other than steps. `notes` are further
    lines of the caption, and `bands` says whether the figure shows the range of the seeds.
    """
    figure.suptitle(title, fontsize=11)
    draw_grid(figure)
    axis = f"step ({axis_note})\n" if axis_note else ""
    width = round(figure.get_figwidth() * CHARACTERS_PER_INCH)
    lines = [textwrap.fill(line, width) for line in (*_caption(runs, bands), *notes)]
    figure.supxlabel(axis + "\n".join(lines), fontsize=8)
    return figure


def _caption(runs: Sequence[Run], bands: bool) -> list[str]:
    """Return a line or two on scale, model, seeds and learning rates of a figure's runs."""
    config = runs[0].config
    seeds = sorted({run.config["seed"] for run in runs})
    scale = config["paper"]["lr_scale"]
    caption = f"{config['paper']['scale']} scale, {config['model']['name']}, {seeds_text(seeds)}"
    caption += f"; learning rates are {scale:g} times those named" if scale != 1 else ""
    if len(seeds) < 2:
        return [caption]
    band = ", a band goes from the lowest to the highest" if bands else ""
    return [caption, f"a line is the mean over seeds{band}"]
