"""Figures of the paper from runs: loss, norm before, norm after; one row a learning rate."""

from collections.abc import Callable, Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.catalogue import ALPHAS, FIGURES, HIGH_RATES, LEARNING_RATES, TABLES, VARIANTS, Setting
from experiments.collection import Found
from experiments.definitions import REACHED_WINDOW, tokens_to_reach
from experiments.distributions import distributions
from experiments.drawing import (
    COLOURS,
    DASHES,
    NothingToDraw,
    finished,
    line,
    mark_bad,
    runs_of,
    smooth,
)
from experiments.runs import Run, without_bad

#: What Figures 5 and 6 compare, by the groups of Table 2.
COMPARED = {"fixed": "Fixed 1.0", "zclip": "ZClip"}


def draw(name: str, found: Found) -> Figure:
    """Return a figure.

    Raises:
        NothingToDraw: none of its runs is done.
    """
    return DRAWN[name](found)


def _losses(title: str, shown: Mapping[str, Setting], found: Found) -> Figure:
    """Draw the losses of some settings over each other."""
    there = {label: runs for label, setting in shown.items() if (runs := runs_of(found, setting))}
    if not there:
        raise NothingToDraw(title)
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    said, every = "", [run for runs in there.values() for run in runs]
    for number, label in enumerate(shown):
        if label in there:
            said = line(ax, there[label], "loss", label, number)
    mark_bad(ax, every)
    ax.set_ylabel("training loss (nats/token)")
    ax.legend()
    return finished(figure, title, said, every, found.notes(shown.items()))


def _norms(axes: Sequence[Axes], there: Mapping[str, list[Run]]) -> str:
    """Draw loss, norm before and norm after into three axes."""
    said = ""
    for label, runs in there.items():
        number = list(COMPARED.values()).index(label)
        said = line(axes[0], runs, "loss", label, number)
        line(axes[1], runs, "grad_norm", label, number, smoothed=False)
        line(axes[2], runs, "clipped_norm", label, number, smoothed=False)
    every = [run for runs in there.values() for run in runs]
    for ax in axes:
        mark_bad(ax, every)
    norms = np.concatenate([run.metrics[column] for run in every for column in ("grad_norm", "clipped_norm")])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    for ax in axes[1:]:
        ax.set_yscale("log")
        if len(norms):
            ax.set_ylim(norms.min() / 1.3, norms.max() * 1.3)
    return said


def _rates(title: str, rates: Collection[float], found: Found) -> Figure:
    """Draw Figure 5 or 6: a row for each learning rate."""
    rows = {row.label: row.settings for row in TABLES["table2"].rows}
    labels = [row.label for lr, row in zip(LEARNING_RATES, TABLES["table2"].rows, strict=True) if lr in rates]
    there = {
        label: {name: runs for group, name in COMPARED.items() if (runs := runs_of(found, rows[label][group]))}
        for label in labels
    }
    there = {label: groups for label, groups in there.items() if groups}
    if not there:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(
        len(there), 3, figsize=(11, 2.5 * len(there) + 0.6), layout="constrained", sharex=True, squeeze=False
    )
    said = ""
    for row, (label, groups) in zip(axes, there.items(), strict=True):
        said = _norms(row, groups)
        row[0].set_ylabel(f"learning rate {label}")
    for ax, heading in zip(axes[0], ("training loss", "gradient norm before", "gradient norm after"), strict=True):
        ax.set_title(heading, fontsize=10)
    axes[0][0].legend(fontsize=8)
    every = [run for groups in there.values() for runs in groups.values() for run in runs]
    notes = found.notes(
        (f"{name} at {label}", rows[label][group]) for label in labels for group, name in COMPARED.items()
    )
    return finished(figure, title, f"loss: {said}; norms not smoothed", every, notes)


def _figure4(found: Found) -> Figure:
    """Draw the losses, and where ZClip reaches what fixed clipping ends with."""
    title = "Figure 4: ZClip at 3e-3 and fixed clipping at 5e-4"
    fixed, zclip = (runs_of(found, setting) for setting in FIGURES["figure4"].values())
    if not fixed or not zclip:
        raise NothingToDraw(title)
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, (label, runs) in enumerate((("Fixed 1.0 at 5e-4", fixed), ("ZClip at 3e-3", zclip))):
        line(ax, runs, "loss", label, number)
    each = int(fixed[0].metrics["tokens"][0])
    target = float(np.mean([without_bad(run, "loss")[-REACHED_WINDOW:].mean() for run in fixed]))
    ax.axhline(target, color="0.4", lw=0.9, ls=":", label=f"loss at the end of fixed clipping, {target:.2f}")
    reached = [tokens_to_reach(without_bad(run, "loss"), run.metrics["tokens"], target) for run in zclip]
    there = [tokens for tokens in reached if tokens is not None]
    if len(there) < len(reached):
        said = f"ZClip does not reach it with {len(reached) - len(there)} of {len(reached)} seeds"
    else:
        share = float(np.mean(there)) / float(fixed[0].metrics["tokens"][-1])
        said = f"ZClip is there after {share:.0%} of the tokens"
        ax.axvline(share * len(fixed[0].metrics["step"]), color=COLOURS[1], lw=0.9, ls=":")
    ax.plot([], [], " ", label=said)
    ax.set_ylabel("training loss (nats/token)")
    ax.legend()
    said = f"a step is {each:,} tokens; mean of {smooth(fixed[0].metrics['loss'])[1]} steps"
    return finished(figure, title, said, [*fixed, *zclip], found.notes(FIGURES["figure4"].items()))


def _figure7(found: Found) -> Figure:
    title = "Figure 7: gradient norms before and after ZClip at 1e-3"
    runs = runs_of(found, FIGURES["figure7"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5), layout="constrained", sharex=True, sharey=True)
    for number, (ax, column, said) in enumerate(
        zip(axes, ("grad_norm", "clipped_norm"), ("before", "after"), strict=True)
    ):
        line(ax, runs, column, f"norm {said}", number, smoothed=False)
        mark_bad(ax, runs)
        ax.set_yscale("log")
        ax.set_ylabel(f"norm {said}")
        ax.legend()
    return finished(figure, title, "not smoothed", runs, found.notes(FIGURES["figure7"].items()))


def _ema(found: Found) -> Figure:
    """Draw mean and standard deviation of the norm as ZClip follows them, by alpha."""
    title = "Mean and standard deviation that ZClip keeps, by alpha"
    there = {label: runs for label, setting in ALPHAS.items() if (runs := runs_of(found, setting))}
    if not there:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5.5), layout="constrained", sharex=True)
    for ax, column, name in zip(axes, ("mean", "std"), ("mean", "standard deviation"), strict=True):
        for number, label in enumerate(ALPHAS):
            if label in there:
                line(ax, there[label], column, f"alpha {label}", number, smoothed=False)
        mark_bad(ax, [run for runs in there.values() for run in runs])
        ax.set_yscale("log")
        settled = np.concatenate([run.metrics[column][10:] for runs in there.values() for run in runs])
        ax.set_ylim(np.nanmin(settled) / 1.3, np.nanmax(settled) * 1.3)
        ax.set_ylabel(name)
    axes[0].legend(ncols=2, fontsize=8)
    every = [run for runs in there.values() for run in runs]
    return finished(figure, title, "not smoothed", every, found.notes(FIGURES["ema"].items()))


def _spike_lab(found: Found) -> Figure:
    """Draw the loss above that of the same seed undisturbed, a panel for each strategy."""
    title = "The spike lab: loss above that of the same run without bad batches"
    there = {}
    for row in TABLES["spike_lab"].rows:
        pairs = [
            (run, found.runs[row.settings["good"], seed])
            for (setting, seed), run in sorted(found.runs.items(), key=lambda pair: pair[0][1])
            if setting == row.settings["bad"] and (row.settings["good"], seed) in found.runs
        ]
        if pairs:
            there[row.label] = pairs
    if not there:
        raise NothingToDraw(title)
    columns = 3
    figure, axes = plt.subplots(
        -(-len(there) // columns), columns, figsize=(11, 2.3 * -(-len(there) // columns) + 0.6), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    width = 1
    for ax, (label, pairs) in zip(axes.flat, there.items(), strict=False):
        rows = []
        for run, undisturbed in pairs:
            above, width = smooth(without_bad(run, "loss") - undisturbed.metrics["loss"])
            rows.append(above)
        step = pairs[0][0].metrics["step"]
        ax.fill_between(step, np.min(rows, axis=0), np.max(rows, axis=0), color=COLOURS[0], alpha=0.2, lw=0)
        ax.plot(step, np.mean(rows, axis=0), color=COLOURS[0], lw=1.3)
        ax.axhline(0, color="0.4", lw=0.8)
        mark_bad(ax, [run for run, _ in pairs])
        ax.set_title(label, fontsize=10)
    for ax in list(axes.flat)[len(there) :]:
        ax.set_axis_off()
    figure.supylabel("nats/token", fontsize=9)
    every = [run for pairs in there.values() for run, _ in pairs]
    notes = found.notes(
        (f"{row.label}, {'with' if group == 'bad' else 'without'} bad batches", row.settings[group])
        for row in TABLES["spike_lab"].rows
        for group in ("bad", "good")
    )
    return finished(figure, title, f"mean of {width} steps; dotted: bad batches", every, notes)


def clipping_functions(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw Figure 3: what becomes of a z-score.

    Args:
        curves: of each variant z-scores and what they become, from the code of the strategies.
    """
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (label, (z, kept)) in enumerate(curves.items()):
        ax.plot(z, kept, color=COLOURS[number], ls=DASHES[number], lw=1.5, label=label)
    ax.set_xlabel("z-score of the norm")
    ax.set_ylabel("z-score after clipping")
    ax.legend()
    ax.grid(alpha=0.25)
    figure.suptitle("Figure 3: the clipping functions, as the strategies compute them", fontsize=11)
    return figure


DRAWN: dict[str, Callable[[Found], Figure]] = {
    "figure1": lambda found: _losses(
        "Figure 1: loss without clipping, with fixed clipping and with ZClip at 3e-3", FIGURES["figure1"], found
    ),
    "figure2": lambda found: _losses("Figure 2: fixed clipping at 1e-3", FIGURES["figure2"], found),
    "figure4": _figure4,
    "figure5": lambda found: _rates("Figure 5: high learning rates", HIGH_RATES, found),
    "figure6": lambda found: _rates(
        "Figure 6: low learning rates", [lr for lr in LEARNING_RATES if lr not in HIGH_RATES], found
    ),
    "figure7": _figure7,
    "figure8": lambda found: _losses("Figure 8: variants of the clipping function at 1e-3", VARIANTS, found),
    "figure9": distributions,
    "table3": lambda found: _losses(
        "Table 3's runs: clipping strategies at 1e-3",
        {row.label: row.settings[""] for row in TABLES["table3"].rows},
        found,
    ),
    "ema": _ema,
    "spike_lab": _spike_lab,
}
