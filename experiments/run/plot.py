"""The picture of one run: loss, gradient norm before and after clipping, z-score and its threshold."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.run.definitions import loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps

BEFORE, AFTER, MARK = "#c2410c", "#1d4ed8", "#b91c1c"


def plot_run(run: Run) -> Path:
    """Draw `plots/run.png` in the run folder and return its path."""
    target = run.path / "plots" / "run.png"
    target.parent.mkdir(exist_ok=True)
    figure = draw_run(run)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def draw_run(run: Run) -> Figure:
    """Return the picture: loss, norms on a log axis, z-score (or clip coefficient), over the steps."""
    figure, axes = plt.subplots(3, 1, figsize=(9, 8.5), sharex=True, layout="constrained")
    _loss(axes[0], run)
    _norm(axes[1], run)
    _decision(axes[2], run)
    axes[-1].set_xlabel("step")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.margins(x=0.01)
    figure.align_ylabels(axes)
    figure.suptitle(run.path.name, fontsize=11)
    return figure


def _loss(ax: Axes, run: Run) -> None:
    step, loss = run.metrics["step"], run.metrics["loss"]
    ax.plot(step, loss, color=AFTER, lw=1, label="training loss")
    for i, spike in enumerate(loss_spikes(loss, corrupted_rows(run))):
        label = "loss spike" if i == 0 else None
        ax.axvspan(
            step[spike.start] - 0.5,
            step[spike.start] + spike.length - 0.5,
            color=MARK,
            alpha=0.25,
            label=label,
        )
    for i, bad in enumerate(corrupted_steps(run)):
        label = f"bad batch put in: {run.config['data']['corruption']['kind']}" if i == 0 else None
        ax.axvline(bad, color="0.4", ls="--", lw=0.8, label=label, zorder=0)
    if finite := [row for row in run.evaluations if "test_loss" in row]:
        tested = [row["test_loss"] for row in finite]
        steps = [row["step"] for row in finite]
        if run.result and run.result["test_loss"] is not None:
            ax.plot([steps[-1], step[-1]], [tested[-1], run.result["test_loss"]], "-", color=BEFORE, lw=1)
        ax.plot(steps, tested, "o-", color=BEFORE, ms=3, lw=1, label="on held-out text")
    if run.result and run.result["test_loss"] is not None:
        test, unigram = run.result["test_loss"], run.result["unigram_entropy"]
        ax.axhline(unigram, color="0.4", ls=":", lw=1, label=f"unigram entropy of the test text {unigram:.2f}")
        ax.plot(step[-1], test, "D", color=BEFORE, ms=6, label=f"test loss {test:.2f}", clip_on=False, zorder=3)
    ax.set_ylabel("loss (nats/token)")
    ax.legend(loc="best")


def _norm(ax: Axes, run: Run) -> None:
    step = run.metrics["step"]
    ax.plot(step, run.metrics["grad_norm"], color=BEFORE, lw=0.9, label="before clipping")
    ax.plot(step, run.metrics["clipped_norm"], color=AFTER, lw=0.9, label="after clipping")
    bound = run.config["clip"].get("max_grad_norm")
    if bound is not None:
        ax.axhline(bound, color="0.4", ls=":", lw=1, label=f"max_grad_norm {bound:g}")
    positive = np.concatenate([run.metrics["grad_norm"], run.metrics["clipped_norm"]])
    if (positive > 0).any():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "246" else "")
    ax.set_ylabel("gradient norm")
    ax.legend(loc="best")


def _decision(ax: Axes, run: Run) -> None:
    step, metrics = run.metrics["step"], run.metrics
    if "z" not in metrics:
        ax.plot(step, metrics["clipped_norm"] / metrics["grad_norm"], color=AFTER, lw=0.9)
        ax.set_ylabel("clip coefficient")
        ax.set_ylim(0, 1.05)
        return
    z, threshold = metrics["z"], run.config["clip"].get("z_thresh")
    ax.plot(step, z, color=AFTER, lw=0.9, label="z-score")
    if threshold is not None:
        spikes = z > threshold
        ax.axhline(threshold, color=BEFORE, ls="--", lw=1, label=f"threshold {threshold:g}")
        ax.plot(
            step[spikes],
            z[spikes],
            "o",
            color=BEFORE,
            ms=4,
            label=f"clipped by z-score: {spikes.sum()} step{'' if spikes.sum() == 1 else 's'}",
        )
    warmup = int(np.isnan(z).cumprod().sum())
    if warmup:
        ax.axvspan(step[0], step[warmup - 1], color="0.5", alpha=0.12, label="warm-up of the statistics")
    if np.nanmax(np.abs(z), initial=0) > 10:
        ax.set_yscale("symlog", linthresh=5)
    else:
        ax.set_ylim(top=1.5 * max(np.nanmax(z, initial=0), threshold or 0))
    ax.set_ylabel("z-score")
    ax.legend(loc="best", ncols=2)
