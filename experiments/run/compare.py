"""Several runs next to each other: one picture, and a sentence or two on what differs.

Runs on the same batches are also compared step by step: what the batches share cancels, and what is left is the effect
of the settings. All are compared with the run of the lowest test loss.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.errors import UserError, shown
from common.files import write_atomic
from common.run_files import value_before
from common.text import flatten
from experiments.run.definitions import EXCESS_WINDOW, corrupted_spans, excess_loss
from experiments.run.read import Run, corrupted_rows, corrupted_steps
from experiments.run.smoothing import smooth
from experiments.run.style import COLORS, LineStyle, draw_grid, image, line_styles

#: Maximum number of runs in a picture: there are as many colours.
MAX_RUNS = len(COLORS)
#: First step whose losses set the range of the axis, as a fraction of the steps: the fall before it is steep.
SCALED_FROM = 0.15


class Compared(NamedTuple):
    """A run of a comparison.

    Attributes:
        label: the settings in which it differs from the other runs.
        run: its folder's contents.
        batches: the settings that determine its batches, without injected corrupted ones.
    """

    label: str
    run: Run
    batches: Mapping[str, Any]

    @property
    def test_loss(self) -> float | None:
        """The test loss; `None` if it is not finite or the run is not finished."""
        return self.run.result.get("test_loss")


class Difference(NamedTuple):
    """A run compared with the best one, in nats; `None` if it cannot be said.

    Attributes:
        label: the run.
        after_corrupted: `excess_loss` over the best run.
        test_loss: test loss minus that of the best run.
    """

    label: str
    after_corrupted: float | None
    test_loss: float | None


def compared(runs: Sequence[Run], identities: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Return runs with their labels; `identities` are the nested settings that determine their numbers.

    Raises:
        UserError: the metrics of a run, perhaps of another version, lack what is drawn.
    """
    for run in runs:
        if "clipped_norm" not in run.metrics:
            raise UserError(f"{run.path}/metrics.jsonl has no clipped_norm")
    flat = [flatten(identity) for identity in identities]
    batches = [
        {key: value for key, value in one.items() if _sets_batches(key)}
        | {"text": run.result.get("data_fingerprint"), "rewinds": list(run.rewinds)}
        for one, run in zip(flat, runs, strict=True)
    ]
    names = _labels(flat)
    if len({*names}) < len(names):  # copies of a run
        names = [run.path.resolve().name for run in runs]
    if len({*names}) < len(names):
        names = [str(run.path) for run in runs]
    return [Compared(*one) for one in zip(names, runs, batches, strict=True)]


def _sets_batches(key: str) -> bool:
    in_data = key.startswith("data.") and not key.startswith(("data.corruption.", "data.instance_filter."))
    return in_data or key in ("seed", "trainer.global_batch_size")


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings in which each run differs from the others, such as "clip=zclip lr=0.01".

    Of a group whose name differs, other keys are named only if they differ between runs of the same name. A run without
    a group has "none" of it.
    """
    keys = sorted({key for one in settings for key in one if not key.endswith("_target_")})
    varied = [key for key in keys if _differ(one.get(key) for one in settings)]
    named = [key for key in varied if key.endswith(".name")]
    for name in named:
        group = name.removesuffix("name")
        for key in [key for key in varied if key.startswith(group) and key != name]:
            by_name: dict[str, list[Any]] = {}
            for one in settings:
                by_name.setdefault(str(one.get(name)), []).append(one.get(key))
            if not any(map(_differ, by_name.values())):
                varied.remove(key)
    varied = named + [key for key in varied if key not in named]
    return [
        " ".join(
            f"{key.removesuffix('.name')}={_shown(one.get(key, 'none'))}"
            for key in varied
            if key in one or key.endswith(".name")
        )
        for one in settings
    ]


def _differ(values: Iterable[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"[{_shown(value[0])}, ..., {_shown(value[-1])}]"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def best(runs: Sequence[Compared]) -> Compared:
    """Return the run with the lowest test loss; the first one if none has a test loss."""
    return min(runs, key=lambda one: np.inf if one.test_loss is None else one.test_loss)


def on_same_batches(runs: Sequence[Compared]) -> bool:
    """Return whether all runs saw the same batches, but for corrupted ones, at the same steps."""
    same_steps = all(np.array_equal(one.run.metrics["step"], runs[0].run.metrics["step"]) for one in runs)
    return same_steps and not _differ(one.batches for one in runs)


def differences(runs: Sequence[Compared]) -> list[Difference]:
    """Return how each other run differs from the best one."""
    reference = best(runs)
    rows = _all_corrupted_rows(runs)
    found = []
    for one in runs:
        if one is reference:
            continue
        after = None
        if on_same_batches(runs) and corrupted_spans(rows, len(one.run.metrics["step"])):
            after = excess_loss(one.run.metrics["loss"], reference.run.metrics["loss"], rows)
            after = after if np.isfinite(after) else None
        losses = (one.test_loss, reference.test_loss)
        test = None if losses[0] is None or losses[1] is None else losses[0] - losses[1]
        found.append(Difference(one.label, after, test))
    return found


def sentences(runs: Sequence[Compared]) -> str:
    """Return sentences, each in a line, on how the others differ from the run with the lowest test loss."""
    found, reference = differences(runs), best(runs)
    if reference.test_loss is None:
        return "No run has a finite test loss."
    after = [(one.label, one.after_corrupted) for one in found]
    at_end = [(one.label, one.test_loss) for one in found]
    said = [
        (f"In the {EXCESS_WINDOW} steps after a corrupted batch, the training loss", after if _known(after) else []),
        ("The final test loss", at_end),
    ]
    lines: list[str] = []
    for subject, values in said:
        if other := [_difference(label, nats) for label, nats in _known(values) if nats]:
            than = "" if lines else f" than with {reference.label}"
            lines.append(f"{subject} was {_listed(other)}{than}.")
        if same := [f"with {label}" for label, nats in _known(values) if nats == 0]:
            lines.append(f"{subject} was the same {_listed(same)} as with {reference.label}.")
        if unknown := [f"with {label}" for label, nats in values if nats is None]:
            lines.append(f"{subject} was not finite {_listed(unknown)}.")
    lines += [
        f"With {one.label}, {change['setting']} is {shown(change['to'])} since step {change['step']}, and was "
        f"{value_before(change)} before."
        for one in runs
        for change in one.run.changes
    ]
    return "\n".join(lines)


def _known(values: Iterable[tuple[str, float | None]]) -> list[tuple[str, float]]:
    return [(label, nats) for label, nats in values if nats is not None]


def _difference(label: str, nats: float) -> str:
    """Return a difference in words: "0.30 nats higher with clip=none"."""
    size = "less than 0.01" if abs(nats) < 0.01 else f"{abs(nats):.2f}"
    return f"{size} nats {'lower' if nats < 0 else 'higher'} with {label}"


def _listed(words: Iterable[str]) -> str:
    """Return "A", "A and B" or "A, B and C"."""
    *first, last = words
    return " and ".join([", ".join(first), last] if first else [last])


def picture_path(paths: Sequence[Path]) -> Path:
    """Return comparison.png in the innermost folder that has all of these run folders."""
    folders = [path.parent for path in paths]
    if any(folder.is_absolute() for folder in folders):
        folders = [folder.absolute() for folder in folders]
    return Path(os.path.commonpath(folders), "comparison.png")


def plot_comparison(runs: Sequence[Compared], target: Path) -> None:
    """Write the picture of a comparison."""
    figure = draw_comparison(runs)
    write_atomic(target, image(figure, "png", dpi=110))
    plt.close(figure)


def draw_comparison(runs: Sequence[Compared]) -> Figure:
    """Return the figure: losses, their differences from the best run if the batches are the same, gradient norms."""
    with_differences = on_same_batches(runs) and len(runs) > 1
    rows = 3 if with_differences else 2
    figure, axes = plt.subplots(rows, 1, figsize=(9, 2.6 * rows + 0.4), sharex=True)
    styles = line_styles([str(one.run.config.get("clip", {}).get("name")) for one in runs])
    _draw_losses(axes[0], runs, styles)
    if with_differences:
        _draw_differences(axes[1], runs, styles)
    _draw_norms(axes[-1], runs, styles)
    for ax in axes:
        _mark_corrupted(ax, runs)
    for ax in (axes[0], axes[-1]):  # the lines in between are those above
        ax.legend(loc="best", fontsize=9)
    axes[-1].set_xlabel("step")
    draw_grid(figure)
    figure.align_ylabels(axes)
    return figure


def _draw_losses(ax: Axes, runs: Sequence[Compared], styles: Sequence[LineStyle]) -> None:
    shown = []
    for one, style in zip(runs, styles, strict=True):
        loss, _ = smooth(one.run.metrics["loss"], corrupted_rows(one.run))
        test = "" if one.test_loss is None else f", test loss {one.test_loss:.2f}"
        ax.plot(one.run.metrics["step"], loss, color=style.color, ls=style.dashes, lw=1.4, label=f"{one.label}{test}")
        shown.append(loss[int(SCALED_FROM * len(loss)) :])
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.06 * (values.max() - values.min()) + 1e-3
        ax.set_ylim(values.min() - margin, values.max() + margin)
    ax.set_ylabel("training loss\n(nats/token)")


def _draw_differences(ax: Axes, runs: Sequence[Compared], styles: Sequence[LineStyle]) -> None:
    reference = best(runs)
    rows = _all_corrupted_rows(runs)
    for one, style in zip(runs, styles, strict=True):
        difference, _ = smooth(one.run.metrics["loss"] - reference.run.metrics["loss"], rows)
        ax.plot(one.run.metrics["step"], difference, color=style.color, ls=style.dashes, lw=1.4, label=one.label)
    ax.set_ylabel(f"loss minus that of\n{reference.label}")


def _draw_norms(ax: Axes, runs: Sequence[Compared], styles: Sequence[LineStyle]) -> None:
    """Draw the norms after clipping, and a circle at the norm before it where a step was clipped."""
    positive = False
    for one, style in zip(runs, styles, strict=True):
        step, before, after = (one.run.metrics[name] for name in ("step", "grad_norm", "clipped_norm"))
        clipped = after < before * (1 - 1e-6)
        ax.plot(step, after, color=style.color, ls=style.dashes, lw=1.1)
        share = f"{one.label}, {np.mean(clipped):.0%} of steps clipped"
        at, low, high = step[clipped], after[clipped], before[clipped]
        gap = np.full(len(at), np.nan)  # between the parts of one line: so many lines would take minutes
        between = (np.stack(ends, axis=1).ravel() for ends in ((at, at, gap), (low, high, gap)))
        ax.plot(*between, color=style.color, lw=0.6, alpha=0.5)
        ax.plot(at, high, "o", mfc="none", color=style.color, ms=4)
        ax.plot([], [], color=style.color, ls=style.dashes, lw=1.4, label=share)
        positive |= bool((after > 0).any())
    ax.plot([], [], "o", mfc="none", color="0.3", ms=4, label="norm before clipping, where a step was clipped")
    if positive:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("gradient norm\nafter clipping")


def _mark_corrupted(ax: Axes, runs: Sequence[Compared]) -> None:
    """Shade the steps with corrupted batches of any run."""
    steps = {step for one in runs for step in corrupted_steps(one.run)}
    starts = sorted(step for step in steps if step - 1 not in steps)
    ends = sorted(step for step in steps if step + 1 not in steps)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        label = "corrupted batches" if i == 0 else None
        ax.axvspan(start - 0.5, end + 0.5, color="0.5", alpha=0.25, lw=0, zorder=0, label=label)


def _all_corrupted_rows(runs: Sequence[Compared]) -> set[int]:
    return set().union(*(corrupted_rows(one.run) for one in runs))
