"""Figures of the paper from runs, for print and for screens: loss, norm before, norm after; one row a learning rate.

Of several seeds a line is the mean, and a band goes from the lowest to the highest. Colours are told apart by the
colour-blind, lines by their dashes too; the background is white everywhere. What is smoothed says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.catalogue import ALPHAS, FIGURES, HIGH_RATES, LEARNING_RATES, TABLES, VARIANTS, Setting
from experiments.collection import Found
from experiments.definitions import REACHED_WINDOW, tokens_to_reach
from experiments.runs import Run, bad_batches, left_out

#: Okabe and Ito's colours, but for the yellow; black last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")

#: Of the steps, the share whose mean is drawn for one.
SMOOTHED = 1 / 60

#: Windows of Figure 9, as shares of the run: the paper's steps 500 to 635 and 3050 to 3185 of 11,900.
WINDOWS = ((500 / 11_900, 635 / 11_900), (3050 / 11_900, 3185 / 11_900))
#: The least steps in such a window, so that runs of few steps have something to test; the first begins after warm-up.
LEAST_STEPS = 50


class NothingToDraw(ValueError):
    """No run of a figure is done."""


def draw(name: str, found: Found) -> Figure:
    """Return a figure.

    Raises:
        NothingToDraw: none of its runs is done.
    """
    return DRAWN[name](found)


def _runs(found: Found, setting: Setting) -> list[Run]:
    return [run for (other, _), run in sorted(found.runs.items(), key=lambda pair: pair[0][1]) if other == setting]


def _smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return means around each value over a number of steps, which is the other result; the ends have fewer."""
    width = max(1, round(len(values) * SMOOTHED)) // 2 * 2 + 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same"), width


def _without_bad(run: Run, column: str) -> np.ndarray:
    """Return a column with values at bad batches taken from the steps around them: they say nothing of the model."""
    values = run.metrics[column].copy()
    bad = sorted(left_out(run))
    good = np.setdiff1d(np.arange(len(values)), bad)
    values[bad] = np.interp(bad, good, values[good])
    return values


def _line(ax: Axes, runs: Sequence[Run], column: str, label: str, number: int, smoothed: bool = True) -> str:
    """Draw a column of some seeds, and return what was done to it."""
    drawn, said = [], ""
    for run in runs:
        values = _without_bad(run, column) if column == "loss" else run.metrics[column]
        if smoothed:
            values, width = _smooth(values)
            said = f"mean of {width} steps"
        drawn.append(values)
    length = min(map(len, drawn))
    rows = np.array([values[:length] for values in drawn])
    step = runs[0].metrics["step"][:length]
    colour = COLOURS[number % len(COLOURS)]
    if len(rows) > 1:
        ax.fill_between(step, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.18, lw=0)
    ax.plot(step, rows.mean(axis=0), color=colour, ls=DASHES[number % len(DASHES)], lw=1.3, label=label)
    return said


def _mark_bad(ax: Axes, runs: Iterable[Run]) -> None:
    """Mark the steps at which bad batches were put in."""
    for number, step in enumerate(sorted({step for run in runs for step in bad_batches(run)})):
        ax.axvline(step, color="0.55", lw=0.7, ls=":", zorder=0, label="bad batch put in" if number == 0 else None)


def _finished(figure: Figure, title: str, said: str = "") -> Figure:
    figure.suptitle(title, fontsize=11)
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.margins(x=0.01)
    if said:
        figure.supxlabel(f"step ({said})" if not said.startswith("tokens") else said, fontsize=9)
    return figure


def _losses(title: str, shown: Mapping[str, Setting], found: Found) -> Figure:
    """Draw the losses of some settings over each other."""
    there = {label: runs for label, setting in shown.items() if (runs := _runs(found, setting))}
    if not there:
        raise NothingToDraw(title)
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    said = ""
    for number, (label, runs) in enumerate(there.items()):
        said = _line(ax, runs, "loss", label, number)
    _mark_bad(ax, [run for runs in there.values() for run in runs])
    ax.set_ylabel("training loss (nats/token)")
    ax.legend()
    return _finished(figure, title, said)


def _norms(axes: Sequence[Axes], there: Mapping[str, list[Run]]) -> str:
    """Draw loss, norm before and norm after into three axes."""
    said = ""
    for number, (label, runs) in enumerate(there.items()):
        said = _line(axes[0], runs, "loss", label, number)
        _line(axes[1], runs, "grad_norm", label, number, smoothed=False)
        _line(axes[2], runs, "clipped_norm", label, number, smoothed=False)
    every = [run for runs in there.values() for run in runs]
    for ax in axes:
        _mark_bad(ax, every)
    low = min(np.nanmin(run.metrics["clipped_norm"][run.metrics["clipped_norm"] > 0]) for run in every)
    high = max(np.nanmax(run.metrics["grad_norm"]) for run in every)
    for ax in axes[1:]:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.3, high * 1.3)
    return said


def _rates(title: str, rates: Sequence[float], found: Found) -> Figure:
    """Draw Figure 5 or 6: a row for each learning rate."""
    rows = {row.label: row.settings for row in TABLES["table2"].rows}
    labels = {f"{lr:.0e}".replace("e-0", "e-"): lr for lr in rates}
    there = {
        label: {
            name: runs
            for group, name in (("fixed", "Fixed 1.0"), ("zclip", "ZClip"))
            if (runs := _runs(found, rows[label][group]))
        }
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
    return _finished(figure, title, f"loss: {said}; norms as they are")


def _figure4(found: Found) -> Figure:
    """Draw the loss over tokens, and where ZClip reaches what fixed clipping ends with."""
    title = "Figure 4: ZClip at 3e-3 and fixed clipping at 5e-4"
    fixed, zclip = (_runs(found, setting) for setting in FIGURES["figure4"].values())
    if not fixed or not zclip:
        raise NothingToDraw(title)
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, (label, runs) in enumerate((("Fixed 1.0 at 5e-4", fixed), ("ZClip at 3e-3", zclip))):
        _line(ax, runs, "loss", label, number)
    each = int(fixed[0].metrics["tokens"][0])
    target = float(np.mean([run.metrics["loss"][-REACHED_WINDOW:].mean() for run in fixed]))
    ax.axhline(target, color="0.4", lw=0.9, ls=":", label=f"loss at the end of fixed clipping, {target:.2f}")
    reached = [tokens_to_reach(run.metrics["loss"], run.metrics["tokens"], target) for run in zclip]
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
    return _finished(figure, title, f"a step is {each:,} tokens; mean of {_smooth(fixed[0].metrics['loss'])[1]} steps")


def _figure7(found: Found) -> Figure:
    title = "Figure 7: gradient norms before and after ZClip at 1e-3"
    runs = _runs(found, FIGURES["figure7"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5), layout="constrained", sharex=True, sharey=True)
    for number, (ax, column, said) in enumerate(
        zip(axes, ("grad_norm", "clipped_norm"), ("before", "after"), strict=True)
    ):
        _line(ax, runs, column, f"norm {said}", number, smoothed=False)
        _mark_bad(ax, runs)
        ax.set_yscale("log")
        ax.set_ylabel(f"norm {said}")
        ax.legend()
    return _finished(figure, title, "as they are")


def distributions(found: Found, windows: Sequence[tuple[int, int]] | None = None) -> Figure:
    """Draw Figure 9: how norms are distributed, as histogram with the fitted normal and Q-Q plot; logarithms too.

    Args:
        found: runs.
        windows: first and last steps; `None`: those of `norm_windows`.

    Raises:
        NothingToDraw: its run is not done.
    """
    title = "Figure 9: how gradient norms are distributed in short windows"
    runs = _runs(found, FIGURES["figure9"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    run = runs[0]
    windows = windows or norm_windows(run)
    figure, axes = plt.subplots(
        len(windows), 4, figsize=(13, 3.1 * len(windows) + 0.5), layout="constrained", squeeze=False
    )
    for row, (first, last) in zip(axes, windows, strict=True):
        values = window_norms(run, first, last)
        for pair, sample, name in ((row[:2], values, "norm"), (row[2:], np.log(values), "log norm")):
            _distribution(pair, sample, name)
        row[0].set_ylabel(f"steps {first} to {last}\ndensity")
    return _finished(figure, f"{title} (seed {run.config['seed']}, before clipping, without bad batches)")


def norm_windows(run: Run) -> list[tuple[int, int]]:
    """Return first and last steps of Figure 9's windows: the paper's places in the run, of 50 steps at least."""
    steps = len(run.metrics["step"])
    found: list[tuple[int, int]] = []
    for begin, end in WINDOWS:
        length = max(LEAST_STEPS, round((end - begin) * steps))
        first = max(round(begin * steps), LEAST_STEPS)
        if found:
            first = max(first, found[-1][1] + 1)
        found.append((first, min(first + length - 1, steps)))
    return found


def window_norms(run: Run, first: int, last: int) -> np.ndarray:
    """Return the norms before clipping of some steps, without those of bad batches and those that are not finite."""
    step = run.metrics["step"]
    kept = (step >= first) & (step <= last) & ~np.isin(step, bad_batches(run))
    values = run.metrics["grad_norm"][kept]
    return values[np.isfinite(values) & (values > 0)]


def _distribution(axes: Sequence[Axes], sample: np.ndarray, name: str) -> None:
    mean, deviation = sample.mean(), sample.std(ddof=1)
    statistic, p = stats.shapiro(sample)
    axes[0].hist(sample, bins="auto", density=True, color=COLOURS[4], edgecolor="white")
    grid = np.linspace(*axes[0].get_xlim(), 200)
    axes[0].plot(grid, stats.norm.pdf(grid, mean, deviation), color=COLOURS[1], lw=1.5)
    axes[0].set_title(f"{name}: Shapiro-Wilk W = {statistic:.3f}, p = {p:.2g}", fontsize=9)
    (theory, ordered), (slope, offset, _) = stats.probplot(sample)
    axes[1].plot(theory, ordered, "o", ms=3, color=COLOURS[0])
    axes[1].plot(theory, slope * theory + offset, color=COLOURS[1], lw=1.2)
    axes[1].set_title(f"{name}: Q-Q", fontsize=9)
    axes[1].set_xlabel("quantiles of the normal", fontsize=8)


def _ema(found: Found) -> Figure:
    """Draw mean and standard deviation of the norm as ZClip follows them, by alpha."""
    title = "Mean and standard deviation that ZClip keeps, by alpha"
    there = {label: runs for label, setting in ALPHAS.items() if (runs := _runs(found, setting))}
    if not there:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 5.5), layout="constrained", sharex=True)
    for ax, column, name in zip(axes, ("mean", "std"), ("mean", "standard deviation"), strict=True):
        for number, (label, runs) in enumerate(there.items()):
            _line(ax, runs, column, f"alpha {label}", number, smoothed=False)
        _mark_bad(ax, [run for runs in there.values() for run in runs])
        ax.set_yscale("log")
        settled = np.concatenate([run.metrics[column][10:] for runs in there.values() for run in runs])
        ax.set_ylim(np.nanmin(settled) / 1.3, np.nanmax(settled) * 1.3)
        ax.set_ylabel(name)
    axes[0].legend(ncols=2, fontsize=8)
    return _finished(figure, title, "as they are")


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
            above, width = _smooth(_without_bad(run, "loss") - undisturbed.metrics["loss"])
            rows.append(above)
        step = pairs[0][0].metrics["step"]
        ax.fill_between(step, np.min(rows, axis=0), np.max(rows, axis=0), color=COLOURS[0], alpha=0.2, lw=0)
        ax.plot(step, np.mean(rows, axis=0), color=COLOURS[0], lw=1.3)
        ax.axhline(0, color="0.4", lw=0.8)
        _mark_bad(ax, [run for run, _ in pairs])
        ax.set_title(label, fontsize=10)
    for ax in list(axes.flat)[len(there) :]:
        ax.set_axis_off()
    figure.supylabel("nats/token", fontsize=9)
    return _finished(figure, title, f"mean of {width} steps; dotted: bad batches")


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
    return _finished(figure, "Figure 3: the clipping functions, as the strategies compute them")


DRAWN: dict[str, Callable[[Found], Figure]] = {
    "figure1": lambda found: _losses(
        "Figure 1: loss without clipping, with fixed clipping and with ZClip at 3e-3", FIGURES["figure1"], found
    ),
    "figure2": lambda found: _losses("Figure 2: fixed clipping leaves spikes", FIGURES["figure2"], found),
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
