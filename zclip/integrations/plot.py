"""Plot of a replay; needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from zclip.trace import ReplayResult


def plot(results: Sequence[ReplayResult], steps: Sequence[float], path: Path) -> None:
    """Plot norms before and after clipping, one panel for each result, with a mark at each clipped step.

    There must be at least one result, and all must be of the same norms.

    Raises:
        OSError: the file cannot be written.
        ValueError: the format, which is the suffix of `path`, is not known.
    """
    figure = Figure(figsize=(9, 2.2 * len(results) + 0.8), layout="constrained")
    axes = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, result in zip(axes, results, strict=True):
        marked = [i for i, clipped in enumerate(result.clipped) if clipped and result.clipped_norms[i] > 0]
        ax.plot(steps, result.norms, color="#c2410c", lw=0.8, label="before")
        ax.plot(steps, [norm or math.nan for norm in result.clipped_norms], color="#1d4ed8", lw=0.8, label="after")
        ax.plot([steps[i] for i in marked], [result.norms[i] for i in marked], "o", color="#c2410c", ms=3)
        fraction, skipped = sum(result.clipped) / len(result.norms), result.clipped_norms.count(0)
        note = f", {skipped} skipped" if skipped else ""
        ax.set_title(f"{result.label}: {fraction:.1%} of the steps clipped{note}", fontsize=9, loc="left")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "246" else "")
        ax.margins(x=0.01)
        ax.grid(alpha=0.25)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    axes[-1].set_xlabel("step")
    figure.supylabel("gradient norm", fontsize=9)
    figure.savefig(path, dpi=120)
