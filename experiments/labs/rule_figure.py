"""The figure of a rule over updates: a run of the reference arm, and one of the same seed with the rule."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.labs.declaration import SpikeLab
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.run.style import AMBER, BLUE, DASHES, GREEN, draw_grid

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


def draw_rule(reference: Run, run: Run, labels: tuple[str, str]) -> Figure:
    """Return the two runs over all steps: their losses, norms, and the scale of the rule with its bound."""
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(8, 7.5), sharex=True, layout="constrained")
    for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
        for one, text, color, dashes in ((reference, labels[0], AMBER, DASHES[2]), (run, labels[1], BLUE, DASHES[0])):
            ax.plot(one.metrics["step"], one.metrics[name], color=color, ls=dashes, lw=0.9, label=text)
        ax.set_ylabel(label, fontsize=8)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    if (bound := run.metrics.get("update_bound")) is not None:
        axes[2].plot(run.metrics["step"], bound, color=GREEN, lw=0.8, label=f"bound of {labels[1]}")
        axes[2].legend(loc="upper right", fontsize=7)
    axes[0].legend(loc="upper right", fontsize=7)
    axes[-1].set_xlabel(f"step of {reference.path.name} and {run.path.name}", fontsize=8)
    draw_grid(figure)
    return figure
