"""Draw the figures of docs/explanation/how-zclip-works.md, with the library's own code.

.venv/bin/python docs/_figures/zclip_rule.py
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from zclip import ZClip

IMAGES = Path(__file__).parent.parent / "images"
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "zclip", "font.size": 8})


def run(zclip: ZClip, norms: list[float]) -> list[dict[str, float]]:
    """Return the telemetry of each step."""
    rows = []
    for norm in norms:
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
        rows.append(zclip.read_telemetry())
    return rows


def noisy(levels: list[float]) -> list[float]:
    """Return norms around these levels, with 10 % noise."""
    noise = torch.randn(len(levels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (torch.tensor(levels, dtype=torch.float64) * (1 + 0.1 * noise)).tolist()


def draw_variants() -> None:
    """Draw the norm after clipping by the norm before, in standard deviations above the mean."""
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    ax = figure.subplots()
    z = torch.linspace(-1, 12, 500)
    for option, label in (("max", "max"), ("adaptive_scaling", "reciprocal (default)"), ("mean", "mean")):
        zclip = ZClip(clip_option=option)
        ax.plot(z, torch.where(z > zclip.z_thresh, zclip.xi(z), z), label=label, lw=1.2)
    ax.axvline(2.5, color="0.6", lw=0.8, ls=":")
    ax.set_xlabel("z-score before clipping")
    ax.set_ylabel("z-score after clipping")
    ax.legend()
    save(figure, "zclip-variants.svg")


def draw_lock_in() -> None:
    """Draw the norms and the mean when the level doubles, with and without recovery."""
    norms = noisy([1.0] * 100 + [2.0] * 140)
    norms[60] = 8.0
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for ax, window in zip(axes, (None, 40), strict=True):
        rows = run(ZClip(recovery_window=window), norms)
        ax.plot(norms, color="#c2410c", lw=0.8, label="norm before clipping")
        ax.plot([row["clipped_norm"] for row in rows], color="#1d4ed8", lw=0.8, label="after")
        ax.plot([row["mean"] for row in rows], color="black", lw=1, ls="--", label="mean")
        clipped = sum(row["clipped"] for row in rows[100:])
        ax.set_title(f"recovery_window={window}: {clipped:.0f} of the last 140 steps clipped", fontsize=8, loc="left")
        ax.set_ylim(0, 4)
    axes[0].legend(loc="upper left", ncols=3)
    axes[1].set_xlabel("step")
    save(figure, "zclip-lock-in.svg")


def save(figure: Figure, name: str) -> None:
    """Write a figure without the date, so that the same code writes the same file."""
    figure.patch.set_facecolor("white")
    figure.savefig(IMAGES / name, metadata={"Date": None})


if __name__ == "__main__":
    draw_variants()
    draw_lock_in()
