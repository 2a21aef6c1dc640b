"""The figures of a lab on spikes."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.labs.declaration import SpikeLab
from experiments.labs.natural_spikes import CALM, NaturalSpike, natural_spikes, warning_steps
from experiments.labs.spike_numbers import SIGNALS
from experiments.labs.spike_tables import AREA_OFFSET, ArmResult
from experiments.labs.statistics import CURE, SMALLEST_RATIO
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.run.style import BLACK, BLUE, COLORS, DASHES, GREEN, ORANGE, draw_grid

#: Panels in a row of the figure of losses.
PANELS = 4
#: Steps before and after the start of a spike in the figure of one spike.
BEFORE, AFTER = 120, 60


def draw_losses(lab: SpikeLab, results: Sequence[ArmResult], collection: RunCollection) -> Figure:
    """Return the losses of all runs: a panel for each arm, a line for each seed."""
    rows = -(-len(results) // PANELS)
    figure, axes = plt.subplots(
        rows, PANELS, figsize=(11, 1.9 * rows + 0.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(results) :]:
        ax.axis("off")
    for ax, result in zip(axes.flat, results, strict=False):
        for number, seed in enumerate(result.numbers):
            run = collection.runs[result.arm, seed]
            color, dashes = COLORS[number % len(COLORS)], DASHES[0]
            ax.plot(run.metrics["step"], run.metrics["loss"], color=color, ls=dashes, lw=0.5, label=f"seed {seed}")
        spikes = sum(len(numbers.spikes) for numbers in result.numbers.values())
        ax.set_title(f"{result.arm.label}: {spikes} spike{'s' * (spikes != 1)}", fontsize=9)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes[:, 0]:
        ax.set_ylabel("loss (nats)", fontsize=8)
    figure.supxlabel("step; a colour is a seed", fontsize=9)
    figure.suptitle(lab.title, fontsize=11)
    draw_grid(figure)
    return figure


def draw_areas(lab: SpikeLab, results: Sequence[ArmResult]) -> Figure:
    """Return the areas of spikes: a row for each arm, a dot for each seed, and the geometric mean."""
    figure, ax = plt.subplots(figsize=(8, 0.34 * len(results) + 1.4), layout="constrained")
    areas = [[numbers.area + AREA_OFFSET for numbers in result.numbers.values()] for result in results]
    finite = [value for values in areas for value in values if np.isfinite(value)]
    most = 2 * max(finite, default=AREA_OFFSET)
    centres = [float(np.exp(np.mean(np.log(np.minimum(values, most))))) for values in areas]
    order = sorted(range(len(results)), key=centres.__getitem__, reverse=True)
    for row, index in enumerate(order):
        color = ORANGE if results[index].arm.is_control else BLUE
        ax.plot(np.minimum(areas[index], most), [row] * len(areas[index]), "o", mfc="none", color=color, ms=5)
        ax.plot([centres[index]], [row], "D" if results[index].arm.is_control else "s", color=color, ms=6)
    ax.set_yticks(range(len(order)), [results[index].arm.label for index in order])
    reference = next((c for c, r in zip(centres, results, strict=True) if r.arm.label == lab.reference), None)
    if reference is not None:
        for share, text in ((1, lab.reference), (SMALLEST_RATIO, "half of it"), (CURE, "a tenth")):
            ax.axvline(share * reference, color="0.5", lw=0.9, ls=":")
            ax.annotate(
                f"{text} ",
                (share * reference, 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right",
                va="top",
                fontsize=7,
            )
    ax.set_xscale("log")
    ax.set_xlabel("area of spikes + 1 (nats x steps); circles are seeds, filled marks their geometric mean")
    ax.plot([], [], "s", color=BLUE, label="strategy")
    ax.plot([], [], "D", color=ORANGE, label="control, without clipping")
    ax.legend(loc="best", fontsize=8)
    draw_grid(figure)
    return figure


def first_spike(runs: Sequence[Run]) -> tuple[Run, NaturalSpike] | None:
    """Return the first spike with enough calm steps before it, of these runs in order; `None` if there is none."""
    for run in runs:
        for spike in natural_spikes(run.metrics["loss"]):
            if spike.start >= CALM[0]:
                return run, spike
    return None


def draw_spike(run: Run, spike: NaturalSpike) -> Figure:
    """Return one spike: each signal as a multiple of its median in calm steps, and where it begins to warn."""
    figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
    start = spike.start
    shown = slice(max(0, start - BEFORE), start + AFTER)
    styles = zip((ORANGE, GREEN, BLACK), (DASHES[1], DASHES[0], DASHES[2]), strict=True)
    for (name, label), (color, dashes) in zip(SIGNALS.items(), styles, strict=True):
        if name in run.metrics:
            _draw_signal(ax, run.metrics[name], label, shown, start, color, dashes)
    ax.axvline(0, color="0.4", lw=0.9)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(f"steps from the start of the spike, step {start + 1} of {run.path.name}")
    ax.set_ylabel("multiple of the median of calm steps")
    ax.legend(loc="upper left", fontsize=8)
    draw_grid(figure)
    return figure


def _draw_signal(
    ax: Axes, signal: np.ndarray, label: str, shown: slice, start: int, color: str, dashes: object
) -> None:
    calm = float(np.nanmedian(signal[start - CALM[0] : start - CALM[1]]))
    warning = warning_steps(signal, start)
    text = f"{label}, warns {warning} steps before" if warning else label
    values = signal[shown] / calm
    ax.plot(
        np.arange(shown.start, shown.start + len(values)) - start, values, color=color, ls=dashes, lw=1.3, label=text
    )
    if warning:
        ax.plot([-warning], [signal[start - warning] / calm], "o", color=color, ms=6)
