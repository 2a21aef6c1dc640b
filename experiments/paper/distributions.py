"""Figure 9: the distribution of gradient norms in short windows of a run."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from common.errors import UserError
from experiments.paper.drawing import NothingToDraw, finish_figure
from experiments.paper.tables_and_figures import FIGURE_RUNS
from experiments.run.collect import RunCollection
from experiments.run.read import Run, corrupted_steps
from experiments.run.style import BLACK, BLUE, DASHES

#: Windows of Figure 9 as fractions of the run: the paper's steps 500 to 635 and 3050 to 3185 of 11,900.
WINDOWS = ((500 / 11_900, 635 / 11_900), (3050 / 11_900, 3185 / 11_900))
#: Minimum number of steps in a window, and before the first one, which begins after warm-up. In short runs, windows are
#: therefore longer and later.
MIN_WINDOW_STEPS = 50
#: Number of norms that the test needs.
MIN_NORMS = 3
#: Most bins of a histogram.
MOST_BINS = 100


def draw_distributions(collection: RunCollection, windows: Sequence[tuple[int, int]] = ()) -> Figure:
    """Draw norms, and their logarithms, as a histogram with the fitted normal distribution and as a Q-Q plot.

    Without `windows`, first and last steps, they are those of `norm_windows`.

    Raises:
        NothingToDraw: the figure's run is not finished.
        UserError: a window of `windows` ends after the run, or has fewer than three norms.
    """
    title = "Figure 9: distribution of gradient norms in windows of steps at 1e-3"
    runs = collection.runs_of(FIGURE_RUNS["figure9"]["ZClip"])
    if not runs:
        raise NothingToDraw(title)
    run = runs[0]
    steps = len(run.metrics["step"])
    for first, last in windows:
        norms = len(window_norms(run, first, last))
        if last > steps:
            raise UserError(f"windows=[[{first},{last}]] is not allowed: the run has {steps} steps")
        if norms < MIN_NORMS:
            raise UserError(
                f"windows=[[{first},{last}]] is not allowed: it has {norms} norms, and {MIN_NORMS} are needed"
            )
    windows = windows or [window for window in norm_windows(run) if len(window_norms(run, *window)) >= MIN_NORMS]
    if not windows:
        raise NothingToDraw(title)
    figure, axes = plt.subplots(len(windows), 4, figsize=(13, 3.1 * len(windows) + 0.5), squeeze=False)
    for row, (first, last) in zip(axes, windows, strict=True):
        sample = window_norms(run, first, last)
        _draw_sample(row[:2], sample, "norm")
        _draw_sample(row[2:], np.log(sample), "log norm")
        row[0].set_ylabel(f"steps {first} to {last}\ndensity")
    longest = max(last - first + 1 for first, last in windows) / steps
    notes = [f"a window is up to {longest:.0%} of the run", *collection.notes(FIGURE_RUNS["figure9"].items())]
    return finish_figure(figure, f"{title} (before clipping, no corrupted batches injected)", "", [run], notes)


def norm_windows(run: Run) -> list[tuple[int, int]]:
    """Return first and last steps of Figure 9's windows: where the paper has them, with at least 50 steps each."""
    steps = len(run.metrics["step"])
    windows: list[tuple[int, int]] = []
    for begin, end in WINDOWS:
        length = max(MIN_WINDOW_STEPS, round((end - begin) * steps))
        first = max(round(begin * steps), MIN_WINDOW_STEPS)
        if windows:
            first = max(first, windows[-1][1] + 1)
        windows.append((first, min(first + length - 1, steps)))
    return windows


def window_norms(run: Run, first: int, last: int) -> np.ndarray:
    """Return the finite norms before clipping from step `first` to `last`, corrupted batches excluded."""
    step = run.metrics["step"]
    in_window = (step >= first) & (step <= last) & ~np.isin(step, corrupted_steps(run))
    norms = run.metrics["grad_norm"][in_window]
    return norms[np.isfinite(norms) & (norms > 0)]


def _draw_sample(axes: Sequence[Axes], sample: np.ndarray, name: str) -> None:
    mean, deviation = sample.mean(), sample.std(ddof=1)
    statistic, p = stats.shapiro(sample)
    axes[0].hist(sample, bins=bin_edges(sample).tolist(), density=True, color="0.75", edgecolor="white")
    grid = np.linspace(*axes[0].get_xlim(), 200)
    axes[0].plot(grid, stats.norm.pdf(grid, mean, deviation), color=BLACK, ls=DASHES[1], lw=1.5)
    axes[0].set_title(f"{name}: Shapiro-Wilk W = {statistic:.3f}, p = {p:.2g}", fontsize=9)
    (theory, ordered), (slope, offset, _) = stats.probplot(sample)
    axes[1].plot(theory, ordered, "o", ms=3, color=BLUE)
    axes[1].plot(theory, slope * theory + offset, color=BLACK, ls=DASHES[1], lw=1.2)
    axes[1].set_title(f"{name}: Q-Q", fontsize=9)
    axes[1].set_xlabel("quantiles of the normal", fontsize=8)


def bin_edges(sample: np.ndarray) -> np.ndarray:
    """Return the edges of a histogram's bins: numpy's, unless an outlier makes too many, or all values are equal."""
    low, high = float(sample.min()), float(sample.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return np.array([low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2])
    quarter, three_quarters = np.quantile(sample, (0.25, 0.75))
    width = 2 * (three_quarters - quarter) / len(sample) ** (1 / 3)  # of Freedman and Diaconis
    return np.histogram_bin_edges(sample, "auto" if high - low <= MOST_BINS * width else "sturges")
