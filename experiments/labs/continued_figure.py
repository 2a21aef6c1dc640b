"""The figure of a lab on changes in the middle of a run: loss, update norm and scale of the rate around the fork."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.labs.continued import compared_arms, fork_step
from experiments.labs.declaration import ContinuedLab
from experiments.run.collect import RunCollection
from experiments.run.style import draw_grid, numbered_style

#: Steps before the fork that are shown.
BEFORE = 100
#: Columns of metrics.jsonl that are drawn, with the labels of their axes.
PANELS = {"loss": "loss (nats)", "update_norm": "update norm", "update_scale": "scale of the rate"}


def draw_forks(lab: ContinuedLab, collection: RunCollection) -> Figure | None:
    """Return the runs of the first seed that has any, a column for each change; `None` if none is finished."""
    ways = compared_arms(lab)
    forked = [arm for arms in ways.values() for arm in arms.values()]
    seeds = [seed for seed in collection.seeds if any((arm, seed) in collection.runs for arm in forked)]
    if not seeds:
        return None
    labels = list(dict.fromkeys(label for arms in ways.values() for label in arms))
    styles = {label: numbered_style(number) for number, label in enumerate(labels)}
    figure, axes = plt.subplots(
        len(PANELS), len(ways), figsize=(2.9 * len(ways), 7.2), sharex=True, layout="constrained", squeeze=False
    )
    for row in axes[1:]:  # losses differ too much for one axis
        for ax in row[1:]:
            ax.sharey(row[0])
    for column, (name, arms) in enumerate(ways.items()):
        for label, arm in arms.items():
            if (run := collection.runs.get((arm, seeds[0]))) is None:
                continue
            style, step = styles[label], fork_step(run)
            shown = slice(max(0, step - BEFORE), None)
            for row, values in enumerate(run.metrics.get(panel) for panel in PANELS):
                if values is not None:
                    ax, steps = axes[row, column], run.metrics["step"][shown] - step
                    ax.plot(steps, values[shown], color=style.color, ls=style.dashes, lw=0.9, label=label)
        axes[0, column].set_title(name, fontsize=9)
        for ax in axes[:, column]:
            ax.axvline(0, color="0.4", lw=0.9)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            ax.tick_params(which="both", labelsize=7)
    for row, label in enumerate(PANELS.values()):
        axes[row, 0].set_ylabel(label, fontsize=8)
    handles = [Line2D([], [], color=style.color, ls=style.dashes, label=label) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    figure.supxlabel(f"steps from the fork, runs of seed {seeds[0]}", fontsize=9)
    draw_grid(figure)
    return figure
