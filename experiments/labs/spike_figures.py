"""The figures of a lab on spikes."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.labs.declaration import SpikeLab
from experiments.labs.natural_spikes import NaturalSpike, after_calm, calm_level, natural_spikes, warning_steps
from experiments.labs.spike_numbers import SIGNALS
from experiments.labs.spike_tables import AREA_OFFSET, ArmResult
from experiments.labs.statistics import CURE, SMALLEST_RATIO
from experiments.run.collect import RunCollection, seeds_text
from experiments.run.read import Run
from experiments.run.style import BLACK, BLUE, GREEN, ORANGE, draw_grid, draw_log_axis, numbered_style

#: Panels in a row of the figure of losses.
PANELS = 4
#: Characters of the title of a panel that fit into a line.
TITLE_WIDTH = 32
#: Steps before and after the start of a spike in the figure of one spike.
BEFORE, AFTER = 60, 40
#: Height that a spike has within the shown steps if it is clear to see, as a multiple of the level.
CLEAR = 10.0


def draw_losses(lab: SpikeLab, results: Sequence[ArmResult], collection: RunCollection) -> Figure:
    """Return the losses of all runs: a panel for each arm, a line for each seed."""
    rows = -(-len(results) // PANELS)
    figure, axes = plt.subplots(
        rows, PANELS, figsize=(11, 1.9 * rows + 0.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    seeds = sorted({seed for result in results for seed in result.numbers})
    styles = {seed: numbered_style(number) for number, seed in enumerate(seeds)}
    for ax in axes.flat[len(results) :]:
        ax.axis("off")
    for ax, result in zip(axes.flat, results, strict=False):
        for seed in result.numbers:
            run = collection.runs[result.arm, seed]
            style = styles[seed]
            ax.plot(run.metrics["step"], run.metrics["loss"], color=style.color, ls=style.dashes, lw=0.5)
        spikes = sum(len(numbers.spikes) for numbers in result.numbers.values())
        count = f"{spikes} spike{'s' * (spikes != 1)}"
        title = f"{result.arm.label}: {count}"
        ax.set_title(title if len(title) <= TITLE_WIDTH else f"{result.arm.label}:\n{count}", fontsize=9)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes[:, 0]:
        ax.set_ylabel("loss (nats)", fontsize=8)
    handles = [Line2D([], [], color=s.color, ls=s.dashes, label=f"seed {seed}") for seed, s in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), fontsize=8, handlelength=4)
    for ax in axes[-1]:
        ax.set_xlabel("step", fontsize=9)
    figure.suptitle(lab.title, fontsize=11)
    draw_grid(figure)
    return figure


def draw_areas(lab: SpikeLab, results: Sequence[ArmResult]) -> Figure:
    """Return the areas of spikes: a row for each arm, a dot for each seed, and the geometric mean.

    Rows name the seeds of an arm that has others than the reference arm.
    """
    figure, ax = plt.subplots(figsize=(9, 0.34 * len(results) + 1.4), layout="constrained")
    areas = [[numbers.area + AREA_OFFSET for numbers in result.numbers.values()] for result in results]
    finite = [value for values in areas for value in values if np.isfinite(value)]
    most = 2 * max(finite, default=AREA_OFFSET)
    centres = [float(np.exp(np.mean(np.log(np.minimum(values, most))))) for values in areas]
    order = sorted(range(len(results)), key=centres.__getitem__, reverse=True)
    for row, index in enumerate(order):
        color = ORANGE if results[index].arm.is_control else BLUE
        ax.plot(np.minimum(areas[index], most), [row] * len(areas[index]), "o", mfc="none", color=color, ms=5)
        ax.plot([centres[index]], [row], "D" if results[index].arm.is_control else "s", color=color, ms=6)
    reference = next((index for index, result in enumerate(results) if result.arm.label == lab.reference), None)
    seeds = None if reference is None else results[reference].numbers
    ax.set_yticks(range(len(order)), [_row_label(results[index], seeds) for index in order])
    if reference is not None:
        centre = centres[reference]
        for share, text in ((1, lab.reference), (SMALLEST_RATIO, "half of it"), (CURE, "a tenth")):
            if share * centre <= AREA_OFFSET:  # no area can be there
                continue
            ax.axvline(share * centre, color="0.5", lw=0.9, ls=":")
            ax.annotate(
                f"{text} ",
                (share * centre, 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right",
                va="top",
                fontsize=7,
            )
    ax.set_xscale("log")
    ax.set_xlabel("area of spikes + 1 (nats x steps)\ncircles are seeds, filled marks their geometric mean")
    ax.plot([], [], "s", color=BLUE, label="strategy")
    ax.plot([], [], "D", color=ORANGE, label="control, without clipping")
    ax.legend(loc="best", fontsize=8)
    draw_grid(figure)
    return figure


def _row_label(result: ArmResult, seeds: Iterable[int] | None) -> str:
    """Return the label of an arm, with its seeds if they are not those of the reference arm."""
    own = sorted(result.numbers)
    return result.arm.label + ("" if seeds is None or own == sorted(seeds) else f" ({seeds_text(own)})")


def first_spike(runs: Sequence[Run]) -> tuple[Run, NaturalSpike] | None:
    """Return the first clear spike after calm steps, of these runs in order; `None` if there is none.

    Within 40 steps, a clear spike has ten times its level.
    """
    for run in runs:
        loss = run.metrics["loss"]
        for spike in after_calm(natural_spikes(loss)):
            if np.nanmax(loss[spike.start : spike.start + AFTER], initial=0) >= CLEAR * spike.level:
                return run, spike
    return None


def draw_spike(run: Run, spike: NaturalSpike) -> Figure:
    """Return one spike: a panel for each signal over about 100 steps, and the step at which it leaves its calm values.

    The grey band ends at the limit above which a signal warns, see `warning_steps`.
    """
    colors = {"update_norm": GREEN, "grad_norm": ORANGE, "loss": BLACK}
    names = [name for name in colors if name in run.metrics]
    size = (8, 0.8 + 1.9 * len(names))
    figure, axes = plt.subplots(len(names), 1, figsize=size, sharex=True, layout="constrained", squeeze=False)
    for ax, name in zip(axes.flat, names, strict=True):
        unit = " (nats)" if name == "loss" else ""
        ax.set_ylabel(SIGNALS[name] + unit, fontsize=9)
        _draw_signal(ax, run, name, spike.start, colors[name])
    axes[-1, 0].set_xlabel(f"step of {run.path.name}; the grey line is the start of the spike", fontsize=9)
    draw_grid(figure)
    figure.align_ylabels()
    return figure


def _draw_signal(ax: Axes, run: Run, name: str, start: int, color: str) -> None:
    signal, step = run.metrics[name], run.metrics["step"]
    shown = slice(max(0, start - BEFORE), start + AFTER)
    ax.plot(step[shown], signal[shown], color=color, lw=1.3)
    ax.axvline(step[start], color="0.4", lw=0.9)
    draw_log_axis(ax, 8)
    level, warning = calm_level(signal, start), warning_steps(signal, start)
    if level is None or warning is None:
        return
    median, limit = level
    ax.axhspan(median**2 / limit, limit, color="0.5", alpha=0.18, lw=0)
    first = start - warning
    ax.axvline(step[first], color=color, lw=0.9, ls="--")
    ax.plot([step[first]], [signal[first]], "o", color=color, ms=7)
    before = f", {warning} before the spike" if warning else ", with the spike"
    ax.set_title(f"leaves its usual level at step {step[first]:.0f}{before}", loc="left", fontsize=9)
