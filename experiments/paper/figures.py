"""The paper's figures from runs: losses, norms before and after clipping, ZClip's statistics, the spike lab."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.claims.verdict import NotTestable
from experiments.paper.by_seed import reached_by_seed
from experiments.paper.distributions import draw_distributions
from experiments.paper.drawing import (
    NothingToDraw,
    finish_figure,
    mark_corrupted,
    pairs_by_seed,
    plot_differences,
    plot_losses,
    plot_seeds,
    scale_by_logarithm,
)
from experiments.paper.tables_and_figures import FIGURE_RUNS, SPIKE_LAB, TABLES, THRESHOLD_NOTE
from experiments.run.collect import RunCollection
from experiments.run.read import Run, corrupted_steps
from experiments.run.style import BLUE, DASHES, STRATEGY_STYLES, LineStyle, line_styles

#: Caption of figures with losses.
EXCLUDED_NOTE = "losses of corrupted batches excluded"
#: Excess loss in nats above which the scale of the spike lab is logarithmic.
LINEAR = 0.1
#: Style of norms before clipping.
BEFORE_STYLE = LineStyle("0.4", DASHES[1])


class Line(NamedTuple):
    """The finished runs behind a line, its label, its strategy (`clip.name`) and its style."""

    label: str
    strategy: str
    style: LineStyle
    runs: Sequence[Run]


#: Draws lines into the axes of a new figure, and returns it with a note on how values were processed.
DrawAxes = Callable[[Sequence[Line], RunCollection], tuple[Figure, str]]


def _runs(lines: Sequence[Line]) -> list[Run]:
    return [run for line in lines for run in line.runs]


def _seeds_label(line: Line, lines: Sequence[Line]) -> str:
    """Return a label with the number of seeds of a line, if another line has more."""
    seeds, max_seeds = len(line.runs), max(len(other.runs) for other in lines)
    return line.label if seeds == max_seeds else f"{line.label} ({seeds} of {max_seeds} seeds)"


def _draw_losses(lines: Sequence[Line], _: RunCollection) -> tuple[Figure, str]:
    """Draw the losses, and below them their differences from the first one."""
    first, *others = lines
    rows = 2 if others else 1
    figure, axes = plt.subplots(rows, 1, figsize=(7.5, 2 + 2.4 * rows), sharex=True, squeeze=False)
    top = axes[0][0]
    for line in lines:
        smoothing = plot_losses(top, line.runs, _seeds_label(line, lines), line.style, band=not others)
    top.set_ylabel("training loss (nats/token)")
    if others:
        ax = axes[1][0]
        for line in others:
            if pairs := pairs_by_seed(line.runs, first.runs):
                plot_differences(ax, pairs, line.label, line.style)
        ax.axhline(0, color=first.style.color, lw=0.9)
        ax.set_ylabel(f'minus "{first.label}",\nsame seed', fontsize=9)
    for (ax,) in axes:
        mark_corrupted(ax, _runs(lines))
    top.legend()
    return figure, f"{smoothing}; {EXCLUDED_NOTE}"


def _plot_norms(axes: Sequence[Axes], lines: Sequence[Line]) -> str:
    """Plot loss, norm before and norm after clipping into three axes, and return how losses were smoothed."""
    for line in lines:
        label = _seeds_label(line, lines)
        smoothing = plot_losses(axes[0], line.runs, label, line.style)
        for ax, column in zip(axes[1:], ("grad_norm", "clipped_norm"), strict=True):
            plot_seeds(ax, [run.metrics[column] for run in line.runs], label, line.style)
    norms = np.concatenate([run.metrics[name] for run in _runs(lines) for name in ("grad_norm", "clipped_norm")])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    for ax in axes[1:]:
        scale_by_logarithm(ax)
        if len(norms):
            ax.set_ylim(norms.min() / 1.3, norms.max() * 1.3)
    for ax in axes:
        mark_corrupted(ax, _runs(lines))
    return smoothing


def _draw_rates(lines: Sequence[Line], _: RunCollection) -> tuple[Figure, str]:
    """Draw a row for each learning rate, in which both strategies are compared."""
    by_rate: dict[str, list[Line]] = {}
    for line in lines:
        label, rate = line.label.split(" at ")
        by_rate.setdefault(rate, []).append(line._replace(label=label, style=STRATEGY_STYLES[line.strategy]))
    rows = len(by_rate)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 2.5 * rows + 0.6), sharex=True, squeeze=False)
    for row, (rate, of_rate) in zip(axes, by_rate.items(), strict=True):
        smoothing = _plot_norms(row, of_rate)
        row[0].set_ylabel(f"learning rate {rate}")
    for ax, heading in zip(axes[0], ("training loss", "gradient norm before", "gradient norm after"), strict=True):
        ax.set_title(heading, fontsize=10)
    axes[0][0].legend(fontsize=8)
    return figure, f"loss: {smoothing}, {EXCLUDED_NOTE}; norms not smoothed"


def _draw_reached(lines: Sequence[Line], collection: RunCollection) -> tuple[Figure, str]:
    """Draw the losses, and where ZClip reaches the final loss of fixed clipping."""
    if len(lines) < 2:
        raise NothingToDraw("both strategies are needed")
    figure, ax = plt.subplots(figsize=(7.5, 4.2))
    for line in lines:
        smoothing = plot_losses(ax, line.runs, line.label, line.style)
    fixed_run = lines[0].runs[0]
    reached_label = _mark_reached(ax, collection, fixed_run)
    mark_corrupted(ax, _runs(lines))
    ax.plot([], [], " ", label=reached_label)
    ax.set_ylabel("training loss (nats/token)")
    ax.legend()
    return figure, f"{int(fixed_run.metrics['tokens'][0]):,} tokens each; {smoothing}; {EXCLUDED_NOTE}"


def _mark_reached(ax: Axes, collection: RunCollection, fixed_run: Run) -> str:
    """Mark the final loss of fixed clipping and where ZClip reaches it, and return the label for the legend."""
    try:
        reached = [*reached_by_seed(collection, *FIGURE_RUNS["figure4"].values()).values()]
    except NotTestable:
        return "fixed clipping has diverged"
    if not reached:
        return "no seed has both runs"
    target = float(np.mean([result.loss for result in reached]))
    ax.axhline(target, color="0.4", lw=0.9, ls=":", label=f"final loss of fixed clipping, {target:.2f}")
    tokens = [result.tokens for result in reached if result.tokens is not None]
    if len(tokens) < len(reached):
        return f"ZClip does not reach it with {len(reached) - len(tokens)} of {len(reached)} seeds"
    fraction = float(np.mean(tokens)) / float(fixed_run.metrics["tokens"][-1])
    ax.axvline(fraction * len(fixed_run.metrics["step"]), color=BLUE, lw=0.9, ls=":")
    return f"ZClip reaches it with {np.mean([result.saved for result in reached]):.0%} fewer tokens"


def _draw_before_and_after(lines: Sequence[Line], _: RunCollection) -> tuple[Figure, str]:
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5), sharex=True, sharey=True)
    columns = {"norm before": ("grad_norm", BEFORE_STYLE), "norm after": ("clipped_norm", STRATEGY_STYLES["zclip"])}
    for ax, (label, (column, style)) in zip(axes, columns.items(), strict=True):
        plot_seeds(ax, [run.metrics[column] for run in _runs(lines)], label, style)
        scale_by_logarithm(ax)
        mark_corrupted(ax, _runs(lines))
        ax.set_ylabel(label)
        ax.legend()
    return figure, "not smoothed"


def _draw_statistics(lines: Sequence[Line], _: RunCollection) -> tuple[Figure, str]:
    """Draw ZClip's running mean and standard deviation of the norm."""
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5.5), sharex=True)
    warmup = lines[0].runs[0].config["clip"]["warmup_steps"]
    for ax, column, name in zip(axes, ("mean", "std"), ("mean", "standard deviation"), strict=True):
        for line in lines:
            rows = [np.where(run.metrics["step"] > warmup, run.metrics[column], np.nan) for run in line.runs]
            plot_seeds(ax, rows, line.label, line.style, band=False)
        scale_by_logarithm(ax)
        mark_corrupted(ax, _runs(lines))
        ax.set_ylabel(name)
    axes[0].legend(ncols=2, fontsize=8)
    return figure, f"after ZClip's {warmup} steps of warm-up; not smoothed"


def _draw_spike_lab(collection: RunCollection) -> Figure:
    """Draw the loss minus that of the baseline run of the same seed, with a panel for each strategy."""
    title = "The spike lab: loss minus that of the baseline run, without corrupted batches, at 1e-3"
    by_label = {
        label: pairs
        for label, specs in SPIKE_LAB.items()
        if (pairs := pairs_by_seed(*(collection.runs_of(specs[group]) for group in ("corrupted", "baseline"))))
    }
    if not by_label:
        raise NothingToDraw(title)
    columns = 5 if len(by_label) > 6 else 3
    rows = -(-len(by_label) // columns)
    size = (11, 2.3 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, (label, pairs) in zip(axes.flat, by_label.items(), strict=False):
        smoothing = plot_differences(ax, pairs, label, STRATEGY_STYLES[SPIKE_LAB[label]["corrupted"].clip])
        ax.axhline(0, color="0.4", lw=0.8)
        mark_corrupted(ax, [run for run, _ in pairs])
        ax.set_title(label, fontsize=10)
    _show_small_and_large_excess(axes.flat[0], [run for pairs in by_label.values() for run, _ in pairs])
    for ax in list(axes.flat)[len(by_label) :]:
        ax.set_axis_off()
    figure.supylabel("nats/token", fontsize=9)
    runs = [run for pairs in by_label.values() for run, _ in pairs]
    scales = f"logarithmic above {LINEAR} nats"
    axis_note = f"{smoothing}; dotted: corrupted batches, whose own losses are excluded; {scales}"
    return finish_figure(figure, title, axis_note, runs, collection.notes(TABLES["spike_lab"].labelled_specs()))


def _show_small_and_large_excess(ax: Axes, runs: Sequence[Run]) -> None:
    """Make the axes of the spike lab, which its panels share, begin before the first corrupted batch.

    Differences of more than `LINEAR` nats are on a logarithmic scale, so that the damage of strategies can be compared.
    """
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.5)
    ax.set_yticks([0, LINEAR / 2, LINEAR, 3 * LINEAR, 10 * LINEAR])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    steps = [step for run in runs for step in corrupted_steps(run)]
    longest = max(len(run.metrics["step"]) for run in runs)
    ax.set_xlim(max(0.0, min(steps, default=0) - longest / 20), longest)


def clipping_functions(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw Figure 3 from z-scores before and after clipping, by label."""
    figure, ax = plt.subplots(figsize=(6, 4))
    for label, (before, after) in curves.items():
        style = STRATEGY_STYLES[f"zclip_{name}" if (name := label.partition(",")[0]) in ("max", "mean") else "zclip"]
        ax.plot(before, after, color=style.color, ls=style.dashes, lw=1.5, label=label)
    ax.set_xlabel("z-score of the norm")
    ax.set_ylabel("z-score after clipping")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    ax.grid(alpha=0.25)
    figure.suptitle("Figure 3: the clipping functions, as the strategies compute them", fontsize=11)
    return figure


def _lines(name: str, title: str, draw_axes: DrawAxes) -> Callable[[RunCollection], Figure]:
    """Return what draws a figure with a line for each label of `FIGURE_RUNS` that has finished runs."""

    def draw_lines(collection: RunCollection) -> Figure:
        specs = FIGURE_RUNS[name]
        styles = line_styles([spec.clip for spec in specs.values()])
        lines = [
            Line(label, spec.clip, style, runs)
            for style, (label, spec) in zip(styles, specs.items(), strict=True)
            if (runs := collection.runs_of(spec))
        ]
        if not lines:
            raise NothingToDraw(title)
        figure, axis_note = draw_axes(lines, collection)
        notes = collection.notes(specs.items())
        if any(spec.lr >= 3e-3 for spec in specs.values()):
            notes.insert(0, THRESHOLD_NOTE)
        return finish_figure(figure, title, axis_note, _runs(lines), notes, bands=name != "ema")

    return draw_lines


#: Draws a figure from runs, by name. Figure 3 needs no runs: see `clipping_functions`.
FIGURES = {
    "figure1": _lines(
        "figure1", "Figure 1: loss without clipping, with fixed clipping and with ZClip at 3e-3", _draw_losses
    ),
    "figure2": _lines("figure2", "Figure 2: fixed clipping at 1e-3", _draw_losses),
    "figure4": _lines("figure4", "Figure 4: ZClip at 3e-3 and fixed clipping at 5e-4", _draw_reached),
    "figure5": _lines("figure5", "Figure 5: high learning rates", _draw_rates),
    "figure6": _lines("figure6", "Figure 6: low learning rates", _draw_rates),
    "figure7": _lines("figure7", "Figure 7: gradient norms before and after ZClip at 1e-3", _draw_before_and_after),
    "figure8": _lines("figure8", "Figure 8: variants of the clipping function at 1e-3", _draw_losses),
    "figure9": draw_distributions,
    "table3": _lines("table3", "Table 3's runs: clipping strategies at 1e-3", _draw_losses),
    "ema": _lines("ema", "ZClip's mean and standard deviation, by alpha, at 1e-3", _draw_statistics),
    "spike_lab": _draw_spike_lab,
}
