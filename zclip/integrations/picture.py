"""The picture of a replay; needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from zclip.replay import Replayed


def draw(results: Sequence[Replayed], steps: Sequence[float], path: Path) -> None:
    """Draw norms before and after, one panel a setting, with a mark at each clipped step.

    Args:
        results: of the same norms; at least one.
        steps: (steps,) their numbers.
        path: of the image, its format by its ending.
    """
    figure = Figure(figsize=(9, 2.2 * len(results) + 0.8), layout="constrained")
    axes = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, result in zip(axes, results, strict=True):
        hit = [i for i, clipped in enumerate(result.clipped) if clipped and result.kept[i] > 0]
        ax.plot(steps, result.norms, color="#c2410c", lw=0.8, label="before")
        ax.plot(steps, [kept or math.nan for kept in result.kept], color="#1d4ed8", lw=0.8, label="after")
        ax.plot([steps[i] for i in hit], [result.norms[i] for i in hit], "o", color="#c2410c", ms=3)
        clipped, skipped = sum(result.clipped) / len(result.norms), result.kept.count(0)
        left = f", {skipped} skipped" if skipped else ""
        ax.set_title(f"{result.label}: {clipped:.1%} of the steps clipped{left}", fontsize=9, loc="left")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "246" else "")
        ax.margins(x=0.01)
        ax.grid(alpha=0.25)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    axes[-1].set_xlabel("step")
    figure.supylabel("gradient norm", fontsize=9)
    figure.savefig(path, dpi=120)
