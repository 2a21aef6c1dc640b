"""The figure of a rule over updates: a run of the reference arm, and one of the same seed with the rule."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.labs.declaration import SpikeLab
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.run.style import GREEN, draw_grid, label_styles

#: Columns of metrics.jsonl that are drawn, with the labels of their axes.
PANELS = {
    "loss": "loss (nats)",
    "grad_norm": "gradient norm",
    "update_norm": "update norm",
    "update_scale": "scale of the rate",
}


def rule_example(lab: SpikeLab, collection: RunCollection) -> tuple[Run, Run] | None:
    """Return runs of one seed of the reference arm and of `lab.example`; `None` if there are none with update norms."""
    if lab.example is not None:
        for seed in collection.seeds:
            found = [collection.runs.get((lab.arm(label), seed)) for label in (lab.reference, lab.example)]
            reference, run = found
            if reference is not None and run is not None and all("update_norm" in r.metrics for r in (reference, run)):
                return reference, run
    return None


def second_moment_norm(run: Run) -> np.ndarray:
    """Return the norm of Adam's root of the second moment after each step, corrected for its bias: (steps,).

    The sum of all elements of `v` is a moving mean of the squared norm of the gradients, so the recorded norms give it.
    """
    beta2 = run.config["optim"]["betas"][1]
    sums, total, taken = np.zeros(len(run.metrics["clipped_norm"])), 0.0, 0
    for step, norm in enumerate(run.metrics["clipped_norm"]):
        if np.isfinite(norm):
            total, taken = beta2 * total + (1 - beta2) * norm**2, taken + 1
        sums[step] = total / (1 - beta2**taken) if taken else np.nan
    return np.sqrt(sums)


def draw_rule(reference: Run, run: Run, labels: tuple[str, str]) -> Figure:
    """Return the two runs over all steps: their losses, norms, and the scale of the rule with its bound."""
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(8, 7.5), sharex=True, layout="constrained")
    styles = label_styles(labels)
    for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
        for one, (text, style) in zip((reference, run), styles.items(), strict=True):
            ax.plot(one.metrics["step"], one.metrics[name], color=style.color, ls=style.dashes, lw=0.9, label=text)
        ax.set_ylabel(label, fontsize=8)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    lagging = second_moment_norm(reference)
    axes[1].plot(reference.metrics["step"], lagging, color=GREEN, lw=0.9, label=f"root of v, {labels[0]}")
    if (bound := run.metrics.get("update_bound")) is not None:
        axes[2].plot(run.metrics["step"], bound, color=GREEN, lw=0.8, label=f"bound of {labels[1]}")
    for ax in axes[:3]:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3, fontsize=7, frameon=False)
    axes[-1].set_xlabel(f"step of {reference.path.name} and {run.path.name}", fontsize=8)
    draw_grid(figure)
    return figure
