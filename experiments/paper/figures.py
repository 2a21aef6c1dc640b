"""The paper's figures from runs: losses, norms before and after clipping, ZClip's statistics, the spike lab."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paper.collect import RunCollection
from experiments.paper.distributions import draw_distributions
from experiments.paper.drawing import (
    NothingToDraw,
    finish_figure,
    mark_corrupted,
    plot_differences,
    plot_losses,
    plot_seeds,
)
from experiments.paper.statistics import NotTestable
from experiments.paper.suites import ALPHAS, COMPARED, FIGURE_RUNS, STRATEGIES, TABLES, THRESHOLD_NOTE, RunSpec
from experiments.paper.verdict import reached_by_seed
from experiments.run.read import Run
from experiments.run.style import COLORS, DASHES, ORANGE

#: Caption of figures with losses.
EXCLUDED_NOTE = "losses of corrupted batches excluded"


def draw(name: str, collection: RunCollection) -> Figure:
    """Return a figure.

    Args:
        name: key of `FIGURES`.
        collection: the runs.

    Raises:
        NothingToDraw: none of its runs is finished.
    """
    return FIGURES[name](collection)


def _runs_by_label(specs: Mapping[str, RunSpec], collection: RunCollection) -> dict[str, list[Run]]:
    """Return the finished runs by label, without labels that have none."""
    return {label: runs for label, spec in specs.items() if (runs := collection.runs_of(spec))}


def _draw_losses(title: str, specs: Mapping[str, RunSpec], collection: RunCollection, note: str = "") -> Figure:
    """Draw the losses of several strategies, and below them their differences from the first one."""
    by_label = _runs_by_label(specs, collection)
    if not by_label:
        raise NothingToDraw(title)
    numbers = {label: number for number, label in enumerate(specs)}
    first, *others = by_label
    rows = 2 if others else 1
    figure, axes = plt.subplots(
        rows, 1, figsize=(7.5, 2 + 2.4 * rows), layout="constrained", sharex=True, squeeze=False
    )
    top, all_runs = axes[0][0], [run for runs in by_label.values() for run in runs]
    max_seeds = max(map(len, by_label.values()))
    for label, runs in by_label.items():
        smoothing = plot_losses(top, runs, _seeds_label(label, runs, max_seeds), numbers[label], band=not others)
    top.set_ylabel("training loss (nats/token)")
    if others:
        ax = axes[1][0]
        first_by_seed = {run.config["seed"]: run for run in by_label[first]}
        for label in others:
            pairs = [
                (run, first_by_seed[seed]) for run in by_label[label] if (seed := run.config["seed"]) in first_by_seed
            ]
            if pairs:
                plot_differences(ax, pairs, label, numbers[label])
        ax.axhline(0, color=COLORS[numbers[first]], lw=0.9)
        ax.set_ylabel(f'minus "{first}",\nsame seed', fontsize=9)
    for (ax,) in axes:
        mark_corrupted(ax, all_runs)
    top.legend()
    notes = [*([note] if note else []), *collection.notes(specs.items())]
    return finish_figure(figure, title, f"{smoothing}; {EXCLUDED_NOTE}", all_runs, notes)


def _seeds_label(label: str, runs: Sequence[Run], max_seeds: int) -> str:
    """Return a label with the number of seeds of a line, if another line has more."""
    return label if len(runs) == max_seeds else f"{label} ({len(runs)} of {max_seeds} seeds)"


def _plot_norms(axes: Sequence[Axes], by_label: Mapping[str, list[Run]]) -> str:
    """Plot loss, norm before and norm after clipping into three axes, and return how losses were smoothed."""
    smoothing, max_seeds = "", max(map(len, by_label.values()))
    for label, runs in by_label.items():
        number, label = COMPARED.index(label), _seeds_label(label, runs, max_seeds)
        smoothing = plot_losses(axes[0], runs, label, number)
        for ax, column in zip(axes[1:], ("grad_norm", "clipped_norm"), strict=True):
            plot_seeds(ax, [run.metrics[column] for run in runs], label, number)
    all_runs = [run for runs in by_label.values() for run in runs]
    for ax in axes:
        mark_corrupted(ax, all_runs)
    norms = np.concatenate([run.metrics[column] for run in all_runs for column in ("grad_norm", "clipped_norm")])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    for ax in axes[1:]:
        ax.set_yscale("log")
        if len(norms):
            ax.set_ylim(norms.min() / 1.3, norms.max() * 1.3)
    return smoothing


def _draw_rates(name: str, title: str, collection: RunCollection, note: str = "") -> Figure:
    """Draw Figure 5 or 6: a row for each learning rate."""
    by_rate: dict[str, dict[str, list[Run]]] = {}
    for label, runs in _runs_by_label(FIGURE_RUNS[name], collection).items():
        strategy, _, rate = label.rpartition(" at ")
        by_rate.setdefault(rate, {})[strategy] = runs
    if not by_rate:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(
        len(by_rate), 3, figsize=(11, 2.5 * len(by_rate) + 0.6), layout="constrained", sharex=True, squeeze=False
    )
    smoothing = ""
    for row, (rate, by_strategy) in zip(axes, by_rate.items(), strict=True):
        smoothing = _plot_norms(row, by_strategy)
        row[0].set_ylabel(f"learning rate {rate}")
    for ax, heading in zip(axes[0], ("training loss", "gradient norm before", "gradient norm after"), strict=True):
        ax.set_title(heading, fontsize=10)
    axes[0][0].legend(fontsize=8)
    all_runs = [run for by_strategy in by_rate.values() for runs in by_strategy.values() for run in runs]
    notes = [*([note] if note else []), *collection.notes(FIGURE_RUNS[name].items())]
    return finish_figure(figure, title, f"loss: {smoothing}, {EXCLUDED_NOTE}; norms not smoothed", all_runs, notes)


def _draw_figure4(collection: RunCollection) -> Figure:
    """Draw the losses, and where ZClip reaches the final loss of fixed clipping."""
    title = "Figure 4: ZClip at 3e-3 and fixed clipping at 5e-4"
    fixed, zclip = (collection.runs_of(spec) for spec in FIGURE_RUNS["figure4"].values())
    if not fixed or not zclip:
        raise NothingToDraw(title)
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, (label, runs) in enumerate(zip(FIGURE_RUNS["figure4"], (fixed, zclip), strict=True)):
        smoothing = plot_losses(ax, runs, label, number)
    step_tokens = int(fixed[0].metrics["tokens"][0])
    reached_label = _mark_reached(ax, collection, fixed[0])
    mark_corrupted(ax, [*fixed, *zclip])
    ax.plot([], [], " ", label=reached_label)
    ax.set_ylabel("training loss (nats/token)")
    ax.legend()
    axis_note = f"{step_tokens:,} tokens each; {smoothing}; {EXCLUDED_NOTE}"
    notes = [THRESHOLD_NOTE, *collection.notes(FIGURE_RUNS["figure4"].items())]
    return finish_figure(figure, title, axis_note, [*fixed, *zclip], notes)


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
    ax.axvline(fraction * len(fixed_run.metrics["step"]), color=ORANGE, lw=0.9, ls=":")
    return f"ZClip reaches it with {np.mean([result.saved for result in reached]):.0%} fewer tokens"


def _draw_figure7(collection: RunCollection) -> Figure:
    title = "Figure 7: gradient norms before and after ZClip at 1e-3"
    runs = collection.runs_of(FIGURE_RUNS["figure7"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5), layout="constrained", sharex=True, sharey=True)
    columns = {"norm before": "grad_norm", "norm after": "clipped_norm"}
    for number, (ax, (label, column)) in enumerate(zip(axes, columns.items(), strict=True)):
        plot_seeds(ax, [run.metrics[column] for run in runs], label, number)
        mark_corrupted(ax, runs)
        ax.set_yscale("log")
        ax.set_ylabel(label)
        ax.legend()
    return finish_figure(figure, title, "not smoothed", runs, collection.notes(FIGURE_RUNS["figure7"].items()))


def _draw_ema(collection: RunCollection) -> Figure:
    """Draw ZClip's running mean and standard deviation of the norm, by alpha."""
    title = "ZClip's mean and standard deviation, by alpha, at 1e-3"
    by_alpha = _runs_by_label(ALPHAS, collection)
    if not by_alpha:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5.5), layout="constrained", sharex=True)
    all_runs = [run for runs in by_alpha.values() for run in runs]
    warmup = all_runs[0].config["clip"]["warmup_steps"]
    for ax, column, name in zip(axes, ("mean", "std"), ("mean", "standard deviation"), strict=True):
        for number, alpha in enumerate(ALPHAS):
            if alpha in by_alpha:
                rows = [np.where(run.metrics["step"] > warmup, run.metrics[column], np.nan) for run in by_alpha[alpha]]
                plot_seeds(ax, rows, f"alpha {alpha}", number, band=False)
        mark_corrupted(ax, all_runs)
        ax.set_yscale("log")
        ax.set_ylabel(name)
    axes[0].legend(ncols=2, fontsize=8)
    axis_note = f"after ZClip's {warmup} steps of warm-up; not smoothed"
    return finish_figure(figure, title, axis_note, all_runs, collection.notes(FIGURE_RUNS["ema"].items()), bands=False)


def _draw_spike_lab(collection: RunCollection) -> Figure:
    """Draw the loss minus that of the baseline run of the same seed, with a panel for each strategy."""
    title = "The spike lab: loss minus that of the baseline run, without corrupted batches, at 1e-3"
    by_label = {}
    for row in TABLES["spike_lab"].rows:
        baselines = {run.config["seed"]: run for run in collection.runs_of(row.specs["baseline"])}
        runs = collection.runs_of(row.specs["corrupted"])
        if pairs := [(run, baselines[seed]) for run in runs if (seed := run.config["seed"]) in baselines]:
            by_label[row.label] = pairs
    if not by_label:
        raise NothingToDraw(title)
    columns = 5 if len(by_label) > 6 else 3
    rows = -(-len(by_label) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 2.3 * rows + 0.6), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    smoothing = ""
    for ax, (label, pairs) in zip(axes.flat, by_label.items(), strict=False):
        smoothing = plot_differences(ax, pairs, label, 0)
        ax.axhline(0, color="0.4", lw=0.8)
        mark_corrupted(ax, [run for run, _ in pairs])
        ax.set_title(label, fontsize=10)
    for ax in list(axes.flat)[len(by_label) :]:
        ax.set_axis_off()
    figure.supylabel("nats/token", fontsize=9)
    runs = [run for pairs in by_label.values() for run, _ in pairs]
    notes = collection.notes(TABLES["spike_lab"].labelled_specs())
    axis_note = f"{smoothing}; dotted: corrupted batches, whose own losses are excluded"
    return finish_figure(figure, title, axis_note, runs, notes)


def clipping_functions(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw Figure 3: z-scores after clipping over z-scores before.

    Args:
        curves: z-scores before and after clipping by label, from the code of the strategies.
    """
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (label, (before, after)) in enumerate(curves.items()):
        ax.plot(before, after, color=COLORS[number], ls=DASHES[number], lw=1.5, label=label)
    ax.set_xlabel("z-score of the norm")
    ax.set_ylabel("z-score after clipping")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    ax.grid(alpha=0.25)
    figure.suptitle("Figure 3: the clipping functions, as the strategies compute them", fontsize=11)
    return figure


def _loss_figure(title: str, specs: Mapping[str, RunSpec], note: str = "") -> Callable[[RunCollection], Figure]:
    return lambda collection: _draw_losses(title, specs, collection, note)


#: Draws a figure from runs, by name. Figure 3 needs no runs: see `clipping_functions`.
FIGURES: dict[str, Callable[[RunCollection], Figure]] = {
    "figure1": _loss_figure(
        "Figure 1: loss without clipping, with fixed clipping and with ZClip at 3e-3",
        FIGURE_RUNS["figure1"],
        THRESHOLD_NOTE,
    ),
    "figure2": _loss_figure("Figure 2: fixed clipping at 1e-3", FIGURE_RUNS["figure2"]),
    "figure4": _draw_figure4,
    "figure5": lambda runs: _draw_rates("figure5", "Figure 5: high learning rates", runs, THRESHOLD_NOTE),
    "figure6": lambda runs: _draw_rates("figure6", "Figure 6: low learning rates", runs),
    "figure7": _draw_figure7,
    "figure8": _loss_figure("Figure 8: variants of the clipping function at 1e-3", FIGURE_RUNS["figure8"]),
    "figure9": draw_distributions,
    "table3": _loss_figure("Table 3's runs: clipping strategies at 1e-3", STRATEGIES),
    "ema": _draw_ema,
    "spike_lab": _draw_spike_lab,
}
