"""How gradient norms are distributed in short windows of a run: Figure 9."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.paper.collect import Found
from experiments.paper.drawing import COLOURS, NothingToDraw, finished, runs_of
from experiments.paper.suites import FIGURES
from experiments.run.read import Run, corrupted_steps

#: Windows of Figure 9, as shares of the run: the paper's steps 500 to 635 and 3050 to 3185 of 11,900. Of short runs
#: they are longer, and later.
WINDOWS = ((500 / 11_900, 635 / 11_900), (3050 / 11_900, 3185 / 11_900))
#: The least steps in such a window, so that runs of few steps have something to test; the first begins after warm-up.
LEAST_STEPS = 50
#: Norms that the test needs.
LEAST_NORMS = 3


class UnfitWindow(ValueError):
    """A window ends after the run, or has fewer than three norms."""


def distributions(found: Found, windows: Sequence[tuple[int, int]] | None = None) -> Figure:
    """Draw Figure 9: how norms are distributed, as histogram with the fitted normal and Q-Q plot; logarithms too.

    Args:
        found: runs.
        windows: first and last steps; `None`: those of `norm_windows`.

    Raises:
        NothingToDraw: its run is not done.
        UnfitWindow: a window that was given ends after the run, or has fewer than three norms.
    """
    title = "Figure 9: how gradient norms are distributed in windows of steps at 1e-3"
    runs = runs_of(found, FIGURES["figure9"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    run = runs[0]
    given = windows is not None
    windows = windows or [each for each in norm_windows(run) if len(window_norms(run, *each)) >= LEAST_NORMS]
    if not windows:
        raise NothingToDraw(title)
    steps = len(run.metrics["step"])
    for first, last in windows if given else ():
        norms = len(window_norms(run, first, last))
        if last > steps or norms < LEAST_NORMS:
            why = (
                f"the run has {steps} steps" if last > steps else f"it has {norms} norms, and {LEAST_NORMS} are needed"
            )
            raise UnfitWindow(f"windows=[[{first},{last}]] is not allowed: {why}")
    figure, axes = plt.subplots(
        len(windows), 4, figsize=(13, 3.1 * len(windows) + 0.5), layout="constrained", squeeze=False
    )
    for row, (first, last) in zip(axes, windows, strict=True):
        values = window_norms(run, first, last)
        for pair, sample, name in ((row[:2], values, "norm"), (row[2:], np.log(values), "log norm")):
            _distribution(pair, sample, name)
        row[0].set_ylabel(f"steps {first} to {last}\ndensity")
    shown = f"{title} (before clipping, no bad batches put in)"
    share = max(last - first + 1 for first, last in windows) / steps
    notes = [f"a window is up to {share:.0%} of the run", *found.notes(FIGURES["figure9"].items())]
    return finished(figure, shown, "", [run], notes)


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
    kept = (step >= first) & (step <= last) & ~np.isin(step, corrupted_steps(run))
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
