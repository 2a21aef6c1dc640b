"""The figures of a lab on bad batches."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.labs.bad_data import BadDataResult, bounded_losses
from experiments.labs.declaration import BadDataLab
from experiments.run.collect import RunCollection
from experiments.run.read import Run, corruption_kinds
from experiments.run.style import BLUE, COLORS, ORANGE, draw_grid, label_styles

#: Steps before and after a bad batch that are shown.
BEFORE, AFTER = 5, 20
#: Arms whose losses after bad batches are drawn, besides the reference: more lines could not be told apart.
SHOWN = ("fixed 1.0", "ZClip", "skip-step", "brake", "ZClip and brake", "instance filter")
#: Marks of the kinds of bad batches.
MARKS = ("o", "s", "D", "^", "v")


def draw_excess(lab: BadDataLab, results: Sequence[BadDataResult]) -> Figure:
    """Return the excess losses: a row for each arm, a circle for each seed, and the mean."""
    figure, ax = plt.subplots(figsize=(8, 0.34 * len(results) + 1.4), layout="constrained")
    excess = [[numbers.excess for numbers in result.numbers.values()] for result in results]
    means = [float(np.mean(values)) for values in excess]
    order = sorted(range(len(results)), key=means.__getitem__, reverse=True)
    for row, index in enumerate(order):
        is_control = results[index].arm.is_control
        color = ORANGE if is_control else BLUE
        ax.plot(excess[index], [row] * len(excess[index]), "o", mfc="none", color=color, ms=5)
        ax.plot([means[index]], [row], "D" if is_control else "s", color=color, ms=6)
    ax.set_yticks(range(len(order)), [results[index].arm.label for index in order])
    ax.axvline(0, color="0.4", lw=0.9)
    for mean, result in zip(means, results, strict=True):
        if result.arm.label == lab.reference:
            ax.axvline(mean, color="0.5", lw=0.9, ls=":")
    ax.set_xlabel("excess loss after bad batches (nats); circles are seeds, filled marks their mean")
    ax.plot([], [], "s", color=BLUE, label="strategy")
    ax.plot([], [], "D", color=ORANGE, label="control, without clipping")
    ax.legend(loc="best", fontsize=8)
    draw_grid(figure)
    return figure


def draw_kinds(results: Sequence[BadDataResult], kinds: Sequence[str]) -> Figure:
    """Return the mean rise of the loss after each kind of bad batch: a row for each arm, a mark for each kind."""
    figure, ax = plt.subplots(figsize=(8, 0.34 * len(results) + 1.6), layout="constrained")
    rows = range(len(results))[::-1]  # the first arm at the top
    for number, kind in enumerate(kinds):
        values = [result.mean_rise(kind) for result in results]
        ax.plot(values, rows, MARKS[number % len(MARKS)], color=COLORS[number], mfc="none", ms=7, label=kind)
    ax.set_yticks(rows, [result.arm.label for result in results])
    ax.axvline(0, color="0.4", lw=0.9)
    ax.set_xlabel("rise of the loss after a bad batch of the kind (nats), mean over seeds")
    ax.legend(loc="best", fontsize=8)
    draw_grid(figure)
    ax.margins(x=0.05)
    return figure


def draw_after(
    lab: BadDataLab, results: Sequence[BadDataResult], collection: RunCollection, kinds: Sequence[str]
) -> Figure:
    """Return the losses around bad batches, minus those without any: a panel for each kind, a line for each arm."""
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(2.6 * len(kinds) + 0.6, 4.0),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    shown = [result for result in results if result.arm.label in (lab.reference, *SHOWN)]
    styles = label_styles([result.arm.label for result in shown])
    steps = np.arange(-BEFORE, AFTER + 1)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        for result in shown:
            clean = lab.clean(result.arm)
            pairs = [(collection.runs[result.arm, seed], collection.runs[clean, seed]) for seed in result.numbers]
            style = styles[result.arm.label]
            mean = around_bad_batches(pairs, kind)
            ax.plot(steps, mean, color=style.color, ls=style.dashes, lw=1.3, label=result.arm.label)
        ax.axvline(0, color="0.4", lw=0.9)
        ax.set_title(kind, fontsize=9)
    axes[0, 0].set_ylabel("loss minus that without bad batches (nats)", fontsize=8)
    figure.supxlabel("steps from the bad batch, whose own loss is left out", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, handlelength=4
    )
    draw_grid(figure)
    return figure


def around_bad_batches(pairs: Sequence[tuple[Run, Run]], kind: str) -> np.ndarray:
    """Return the mean difference of losses around all bad batches of a kind: (BEFORE + 1 + AFTER,) in nats.

    `pairs` are runs with those of the same arm and seed without bad batches. Bad batches themselves, and steps from the
    next one on, have no value.
    """
    rows = []
    for run, clean in pairs:
        kinds = corruption_kinds(run)
        difference = bounded_losses(run) - bounded_losses(clean)
        difference[[step - 1 for step in kinds]] = np.nan
        padded = np.pad(difference, (BEFORE, AFTER), constant_values=np.nan)
        for step in (step for step, of in kinds.items() if of == kind):
            values = padded[step - 1 : step + BEFORE + AFTER].copy()
            following = [other - step for other in kinds if 0 < other - step <= AFTER]
            if following:
                values[BEFORE + min(following) :] = np.nan
            rows.append(values)
    values = np.array(rows).reshape(-1, BEFORE + 1 + AFTER)
    counts = np.isfinite(values).sum(axis=0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)
