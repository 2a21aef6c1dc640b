"""The plot of one run: loss, gradient norm before and after clipping, z-score and its threshold, update norm."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import make_dir, write_atomic
from experiments.run.definitions import loss_spikes
from experiments.run.read import Run, corrupted_rows, corrupted_steps
from experiments.run.style import BLUE, ORANGE, PURPLE, draw_grid, image


def plot_run(run: Run) -> Path:
    """Write `plots/run.png` in the run folder and return its path."""
    target = run.path / "plots" / "run.png"
    make_dir(target.parent)
    figure = draw_run(run)
    write_atomic(target, image(figure, "png", dpi=120))
    plt.close(figure)
    return target


def draw_run(run: Run) -> Figure:
    """Return the figure: loss, norms on a log axis, z-score (or clip coefficient), over the steps.

    What a rule over updates measured has a panel too: the norm of the update with the scale of the learning rate,
    StableAdamW's highest RMS, or the share of elements that SPAM clipped.

    Raises:
        ValueError: the metrics, perhaps of another version, lack one of these.
    """
    if "clipped_norm" not in run.metrics:
        raise ValueError("metrics.jsonl has no clipped_norm")
    updates = {"update_norm": _draw_update, "update_rms": _draw_rms, "clipped_element_share": _draw_elements}
    drawn = [draw for name, draw in updates.items() if name in run.metrics]
    panels = [_draw_loss, _draw_norm, _draw_z_score, *drawn]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 1 + 2.5 * len(panels)), sharex=True)
    for ax, draw in zip(axes, panels, strict=True):
        draw(ax, run)
    axes[-1].set_xlabel("step")
    draw_grid(figure)
    figure.align_ylabels(axes)
    figure.suptitle(run.path.name, fontsize=11)
    return figure


def _draw_loss(ax: Axes, run: Run) -> None:
    step, loss = run.metrics["step"], run.metrics["loss"]
    ax.plot(step, loss, color=BLUE, lw=1, label="training loss")
    for i, spike in enumerate(loss_spikes(loss, corrupted_rows(run))):
        first = step[spike.start]
        label = "loss spike" if i == 0 else None
        ax.axvspan(first - 0.5, first + spike.length - 0.5, color=PURPLE, alpha=0.4, label=label)
    for i, corrupted in enumerate(corrupted_steps(run)):
        label = f"injected corrupted batch: {run.config['data']['corruption']['kind']}" if i == 0 else None
        ax.axvline(corrupted, color="0.4", ls="--", lw=0.8, label=label, zorder=0)
    test = run.result.get("test_loss")
    if validated := [row for row in run.val_metrics if "val_loss" in row]:
        losses = [row["val_loss"] for row in validated]
        steps = [row["step"] for row in validated]
        if test is not None:
            ax.plot([steps[-1], step[-1]], [losses[-1], test], "-", color=ORANGE, lw=1)
        ax.plot(steps, losses, "o-", color=ORANGE, ms=3, lw=1, label="validation loss")
    if test is not None:
        unigram = run.result["unigram_entropy"]
        ax.axhline(unigram, color="0.4", ls=":", lw=1, label=f"unigram entropy of the test text {unigram:.2f}")
        ax.plot(step[-1], test, "D", color=ORANGE, ms=6, label=f"test loss {test:.2f}", clip_on=False, zorder=3)
    ax.set_ylabel("loss (nats/token)")
    ax.legend(loc="best")


def _values(argument: np.ndarray) -> str:
    """Return the values of an argument that may have changed."""
    return ", ".join(f"{value:g}" for value in dict.fromkeys(argument[~np.isnan(argument)].tolist()))


def _draw_norm(ax: Axes, run: Run) -> None:
    step = run.metrics["step"]
    ax.plot(step, run.metrics["grad_norm"], color=ORANGE, lw=0.9, label="before clipping")
    ax.plot(step, run.metrics["clipped_norm"], color=BLUE, lw=0.9, label="after clipping")
    bound = run.argument("max_grad_norm")
    if not np.isnan(bound).all():
        ax.plot(step, bound, color="0.4", ls=":", lw=1, label=f"max_grad_norm {_values(bound)}")
    norms = np.concatenate([run.metrics["grad_norm"], run.metrics["clipped_norm"]])
    _log_scale(ax, norms)
    ax.set_ylabel("gradient norm")
    ax.legend(loc="best")


def _log_scale(ax: Axes, values: np.ndarray) -> None:
    """Make the axis of these values logarithmic, if one of them is above 0."""
    if (values > 0).any():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "246" else "")


def _draw_z_score(ax: Axes, run: Run) -> None:
    step, metrics = run.metrics["step"], run.metrics
    if "z" not in metrics:
        with np.errstate(invalid="ignore"):  # both are 0 where all rows are masked
            ax.plot(step, metrics["clipped_norm"] / metrics["grad_norm"], color=BLUE, lw=0.9)
        ax.set_ylabel("clip coefficient")
        ax.set_ylim(0, 1.05)
        return
    z, threshold = metrics["z"], run.argument("z_thresh")
    ax.plot(step, z, color=BLUE, lw=0.9, label="z-score")
    if not np.isnan(threshold).all():
        spikes = z > threshold
        ax.plot(step, threshold, color=ORANGE, ls="--", lw=1, label=f"threshold {_values(threshold)}")
        label = f"clipped by z-score: {spikes.sum()} step{'' if spikes.sum() == 1 else 's'}"
        ax.plot(step[spikes], z[spikes], "o", color=ORANGE, ms=4, label=label)
    warmup = int(np.isnan(z).cumprod().sum())
    if warmup:
        ax.axvspan(step[0], step[warmup - 1], color="0.5", alpha=0.12, label="warm-up of the statistics")
    if np.nanmax(np.abs(z), initial=0) > 10:
        ax.set_yscale("symlog", linthresh=5)
    else:
        ax.set_ylim(top=1.5 * max(np.nanmax(z, initial=0), np.nanmax(threshold, initial=0)))
    ax.set_ylabel("z-score")
    ax.legend(loc="best", ncols=2)


def _draw_update(ax: Axes, run: Run) -> None:
    step, norm, scale = (run.metrics[name] for name in ("step", "update_norm", "update_scale"))
    ax.plot(step, norm, color=ORANGE, lw=0.9, label="update norm")
    if np.nanmin(scale, initial=1.0) < 1:
        ax.plot(step, norm * scale, color=BLUE, lw=0.9, label="the same, scaled")
    _log_scale(ax, norm)
    ax.set_ylabel("update norm")
    rate = ax.twinx()
    rate.plot(step, scale, color=PURPLE, lw=0.9, label="scale of the learning rate")
    rate.set_ylim(0, 1.05)
    rate.set_ylabel("scale")
    lines = [*ax.lines, *rate.lines]
    rate.legend(lines, [str(line.get_label()) for line in lines], loc="lower left", ncols=3)


def _draw_rms(ax: Axes, run: Run) -> None:
    step, rms, tensors = (run.metrics[name] for name in ("step", "update_rms", "update_clipped_tensors"))
    ax.plot(step, rms, color=ORANGE, lw=0.9, label="highest RMS of a tensor")
    ax.axhline(1.0, color=ORANGE, ls="--", lw=1, label="above 1 its rate is divided")
    ax.set_ylim(bottom=0, top=1.3 * max(1.0, np.nanmax(rms, initial=0)))  # room for the legend
    ax.set_ylabel("RMS")
    counts = ax.twinx()
    counts.plot(step, tensors, color=PURPLE, lw=0.9, label="tensors with a lower rate")
    counts.set_ylim(bottom=0, top=1.3 * max(1.0, np.nanmax(tensors, initial=0)))
    counts.set_ylabel("tensors")
    lines = [*ax.lines, *counts.lines]
    counts.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", ncols=3)


def _draw_elements(ax: Axes, run: Run) -> None:
    step, share = run.metrics["step"], run.metrics["clipped_element_share"]
    ax.plot(step, 100 * share, color=ORANGE, lw=0.9)
    ax.set_ylabel("clipped elements (%)")
