"""Figures of the paper from runs: loss, norm before, norm after; one row a learning rate."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paper.collect import Found
from experiments.paper.distributions import distributions
from experiments.paper.drawing import (
    COLOURS,
    DASHES,
    NothingToDraw,
    differences,
    finished,
    losses,
    mark_bad,
    over_seeds,
    runs_of,
)
from experiments.paper.judging import reached_by_seed
from experiments.paper.statistics import NotTestable
from experiments.paper.suites import (
    ALPHAS,
    COMPARED,
    FIGURES,
    STRATEGIES,
    TABLES,
    THRESHOLD_SAYS,
    Setting,
)
from experiments.run.read import Run

#: What stands below figures with losses.
LEFT_OUT = "losses of bad batches left out"


def draw(name: str, found: Found) -> Figure:
    """Return a figure.

    Raises:
        NothingToDraw: none of its runs is done.
    """
    return DRAWN[name](found)


def _losses(title: str, shown: Mapping[str, Setting], found: Found, says: str = "") -> Figure:
    """Draw the losses of some settings over each other, and below them what they are above the first one's."""
    there = {label: runs for label, setting in shown.items() if (runs := runs_of(found, setting))}
    if not there:
        raise NothingToDraw(title)
    numbers = {label: number for number, label in enumerate(shown)}
    first, *others = there
    rows = 2 if others else 1
    figure, axes = plt.subplots(
        rows, 1, figsize=(7.5, 2 + 2.4 * rows), layout="constrained", sharex=True, squeeze=False
    )
    top, every = axes[0][0], [run for runs in there.values() for run in runs]
    most = max(map(len, there.values()))
    for label, runs in there.items():
        said = losses(top, runs, _with_seeds(label, runs, most), numbers[label], band=not others)
    top.set_ylabel("training loss (nats/token)")
    if others:
        ax = axes[1][0]
        of_first = {run.config["seed"]: run for run in there[first]}
        for label in others:
            pairs = [(run, of_first[seed]) for run in there[label] if (seed := run.config["seed"]) in of_first]
            if pairs:
                differences(ax, pairs, label, numbers[label])
        ax.axhline(0, color=COLOURS[numbers[first]], lw=0.9)
        ax.set_ylabel(f'minus "{first}",\nsame seed', fontsize=9)
    for (ax,) in axes:
        mark_bad(ax, every)
    top.legend()
    notes = [says] if says else []
    return finished(figure, title, f"{said}; {LEFT_OUT}", every, [*notes, *found.notes(shown.items())])


def _with_seeds(label: str, runs: Sequence[Run], most: int) -> str:
    """Return a label that says how many seeds a line is of, if another is of more."""
    return label if len(runs) == most else f"{label} ({len(runs)} of {most} seeds)"


def _norms(axes: Sequence[Axes], there: Mapping[str, list[Run]]) -> str:
    """Draw loss, norm before and norm after into three axes."""
    said, most = "", max(map(len, there.values()))
    for label, runs in there.items():
        number, label = COMPARED.index(label), _with_seeds(label, runs, most)
        said = losses(axes[0], runs, label, number)
        for ax, column in zip(axes[1:], ("grad_norm", "clipped_norm"), strict=True):
            over_seeds(ax, [run.metrics[column] for run in runs], label, number)
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


def _rates(name: str, title: str, found: Found, says: str = "") -> Figure:
    """Draw Figure 5 or 6: a row for each learning rate."""
    there: dict[str, dict[str, list[Run]]] = {}
    for label, setting in FIGURES[name].items():
        strategy, _, rate = label.rpartition(" at ")
        if runs := runs_of(found, setting):
            there.setdefault(rate, {})[strategy] = runs
    if not there:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(
        len(there), 3, figsize=(11, 2.5 * len(there) + 0.6), layout="constrained", sharex=True, squeeze=False
    )
    said = ""
    for row, (rate, groups) in zip(axes, there.items(), strict=True):
        said = _norms(row, groups)
        row[0].set_ylabel(f"learning rate {rate}")
    for ax, heading in zip(axes[0], ("training loss", "gradient norm before", "gradient norm after"), strict=True):
        ax.set_title(heading, fontsize=10)
    axes[0][0].legend(fontsize=8)
    every = [run for groups in there.values() for runs in groups.values() for run in runs]
    notes = [*([says] if says else []), *found.notes(FIGURES[name].items())]
    return finished(figure, title, f"loss: {said}, {LEFT_OUT}; norms not smoothed", every, notes)


def _figure4(found: Found) -> Figure:
    """Draw the losses, and where ZClip reaches what fixed clipping ends with."""
    title = "Figure 4: ZClip at 3e-3 and fixed clipping at 5e-4"
    fixed, zclip = (runs_of(found, setting) for setting in FIGURES["figure4"].values())
    if not fixed or not zclip:
        raise NothingToDraw(title)
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, (label, runs) in enumerate(zip(FIGURES["figure4"], (fixed, zclip), strict=True)):
        smoothed = losses(ax, runs, label, number)
    each = int(fixed[0].metrics["tokens"][0])
    there = _reached(ax, found, fixed[0])
    mark_bad(ax, [*fixed, *zclip])
    ax.plot([], [], " ", label=there)
    ax.set_ylabel("training loss (nats/token)")
    ax.legend()
    said = f"{each:,} tokens each; {smoothed}; {LEFT_OUT}"
    notes = [THRESHOLD_SAYS, *found.notes(FIGURES["figure4"].items())]
    return finished(figure, title, said, [*fixed, *zclip], notes)


def _reached(ax: Axes, found: Found, run: Run) -> str:
    """Draw the loss at the end of fixed clipping, of which a run is given, and say when ZClip is there, by seed."""
    fixed, zclip = FIGURES["figure4"].values()
    try:
        reached = [*reached_by_seed(found, fixed, zclip).values()]
    except NotTestable:
        return "fixed clipping has diverged"
    if not reached:
        return "no seed has both"
    target = float(np.mean([each.loss for each in reached]))
    ax.axhline(target, color="0.4", lw=0.9, ls=":", label=f"loss at the end of fixed clipping, {target:.2f}")
    there = [each.tokens for each in reached if each.tokens is not None]
    if len(there) < len(reached):
        return f"ZClip does not reach it with {len(reached) - len(there)} of {len(reached)} seeds"
    share = float(np.mean(there)) / float(run.metrics["tokens"][-1])
    ax.axvline(share * len(run.metrics["step"]), color=COLOURS[1], lw=0.9, ls=":")
    return f"ZClip is there with {np.mean([each.saved for each in reached]):.0%} fewer tokens"


def _figure7(found: Found) -> Figure:
    title = "Figure 7: gradient norms before and after ZClip at 1e-3"
    runs = runs_of(found, FIGURES["figure7"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5), layout="constrained", sharex=True, sharey=True)
    for number, (ax, column, said) in enumerate(
        zip(axes, ("grad_norm", "clipped_norm"), ("before", "after"), strict=True)
    ):
        over_seeds(ax, [run.metrics[column] for run in runs], f"norm {said}", number)
        mark_bad(ax, runs)
        ax.set_yscale("log")
        ax.set_ylabel(f"norm {said}")
        ax.legend()
    return finished(figure, title, "not smoothed", runs, found.notes(FIGURES["figure7"].items()))


def _ema(found: Found) -> Figure:
    """Draw mean and standard deviation of the norm as ZClip follows them, by alpha."""
    title = "Mean and standard deviation that ZClip keeps, by alpha, at 1e-3"
    there = {label: runs for label, setting in ALPHAS.items() if (runs := runs_of(found, setting))}
    if not there:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5.5), layout="constrained", sharex=True)
    every = [run for runs in there.values() for run in runs]
    warmup = every[0].config["clip"]["warmup_steps"]
    for ax, column, name in zip(axes, ("mean", "std"), ("mean", "standard deviation"), strict=True):
        for number, label in enumerate(ALPHAS):
            if label in there:
                rows = [np.where(run.metrics["step"] > warmup, run.metrics[column], np.nan) for run in there[label]]
                over_seeds(ax, rows, f"alpha {label}", number, band=False)
        mark_bad(ax, every)
        ax.set_yscale("log")
        ax.set_ylabel(name)
    axes[0].legend(ncols=2, fontsize=8)
    said = f"after ZClip's {warmup} steps of warm-up; not smoothed"
    return finished(figure, title, said, every, found.notes(FIGURES["ema"].items()), bands=False)


def _spike_lab(found: Found) -> Figure:
    """Draw the loss above that of the same seed undisturbed, a panel for each strategy."""
    title = "The spike lab: loss above that of the same run without bad batches, at 1e-3"
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
    columns = 5 if len(there) > 6 else 3
    figure, axes = plt.subplots(
        -(-len(there) // columns), columns, figsize=(11, 2.3 * -(-len(there) // columns) + 0.6), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    said = ""
    for ax, (label, pairs) in zip(axes.flat, there.items(), strict=False):
        said = differences(ax, pairs, label, 0)
        ax.axhline(0, color="0.4", lw=0.8)
        mark_bad(ax, [run for run, _ in pairs])
        ax.set_title(label, fontsize=10)
    for ax in list(axes.flat)[len(there) :]:
        ax.set_axis_off()
    figure.supylabel("nats/token", fontsize=9)
    every = [run for pairs in there.values() for run, _ in pairs]
    notes = found.notes(TABLES["spike_lab"].labelled())
    return finished(figure, title, f"{said}; dotted: bad batches, whose own losses are left out", every, notes)


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
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    ax.grid(alpha=0.25)
    figure.suptitle("Figure 3: the clipping functions, as the strategies compute them", fontsize=11)
    return figure


DRAWN: dict[str, Callable[[Found], Figure]] = {
    "figure1": lambda found: _losses(
        "Figure 1: loss without clipping, with fixed clipping and with ZClip at 3e-3",
        FIGURES["figure1"],
        found,
        THRESHOLD_SAYS,
    ),
    "figure2": lambda found: _losses("Figure 2: fixed clipping at 1e-3", FIGURES["figure2"], found),
    "figure4": _figure4,
    "figure5": lambda found: _rates("figure5", "Figure 5: high learning rates", found, THRESHOLD_SAYS),
    "figure6": lambda found: _rates("figure6", "Figure 6: low learning rates", found),
    "figure7": _figure7,
    "figure8": lambda found: _losses("Figure 8: variants of the clipping function at 1e-3", FIGURES["figure8"], found),
    "figure9": distributions,
    "table3": lambda found: _losses(
        "Table 3's runs: clipping strategies at 1e-3",
        STRATEGIES,
        found,
    ),
    "ema": _ema,
    "spike_lab": _spike_lab,
}
