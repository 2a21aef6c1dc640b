"""In the figures of all labs, what is compared has the same style everywhere, and no two lines of a panel share one."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments.labs.bad_data import BadDataResult
from experiments.labs.bad_data_figures import SHOWN, draw_after
from experiments.labs.continued import compared_arms
from experiments.labs.continued_figure import draw_forks
from experiments.labs.declaration import LABS, STRATEGIES, arm_of
from experiments.labs.rate_report import draw_rates
from experiments.labs.rates import Curve, RateResult
from experiments.labs.rule_figure import draw_rule
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.run.style import STRATEGY_LABELS, STRATEGY_STYLES, LineStyle, label_styles, numbered_style

STEPS = 300


def made_run(steps=STEPS, **columns):
    names = ("loss", "grad_norm", "clipped_norm", "update_norm", "update_scale", "update_bound")
    metrics = {"step": np.arange(1.0, steps + 1), **{name: np.linspace(2, 1, steps) for name in names}, **columns}
    config = {"fork_from": "runs/base@100", "optim": {"betas": [0.9, 0.999]}, "seed": 0}
    return Run(Path("run"), config, metrics, {"steps": steps}, [], [], [])


def of_runs(runs):
    return RunCollection(runs, set(), {}, [], frozenset())


def rates(name):
    lab = LABS[name]
    curve = Curve(np.ones(len(lab.rates)), 0.5)
    return draw_rates(lab, [RateResult(arm, {0: curve}, None, None) for arm in lab.arms])


def forks():
    lab = LABS["continued"]
    runs = {(arm, 0): made_run() for arms in compared_arms(lab).values() for arm in arms.values()}
    return draw_forks(lab, of_runs(runs))


def after():
    lab = LABS["bad_data"]
    results = [BadDataResult(arm_of(lab.arms, label), {0: None}, None, None) for label in (lab.reference, *SHOWN)]
    runs = {(each, 0): made_run() for result in results for each in (result.arm, lab.clean(result.arm))}
    return draw_after(lab, results, of_runs(runs), ["labels", "random"])


def rule():
    return draw_rule(made_run(), made_run(), ("no clipping", "brake"))


def compared_lines(figure):
    """Return label and style of each labelled line of each panel; legends of rates add the sensitivity."""
    for ax in figure.axes:
        lines = [line for line in ax.lines if line.get_label()[0] != "_"]
        yield [
            (
                line.get_label().partition(", sensitivity")[0],
                (to_hex(line.get_color()), str(line._unscaled_dash_pattern)),
            )
            for line in lines
        ]


def test_what_is_compared_has_one_style_in_all_figures_of_labs():
    figures = [rates("rate"), rates("depth"), forks(), after(), rule()]
    found = {}
    for figure in figures:
        for panel in compared_lines(figure):
            assert panel and len({style for _, style in panel}) == len({label for label, _ in panel}), panel
            for label, style in panel:
                found.setdefault(label, set()).add(style)
        plt.close(figure)
    assert len(found) > 20 and {label: styles for label, styles in found.items() if len(styles) > 1} == {}
    for label, name in STRATEGY_LABELS.items():
        for color, _ in found.get(label, ()):
            assert color == STRATEGY_STYLES[name].color.lower(), "that of the paper's figures"


def test_lines_of_a_figure_differ_in_grey():
    """Lines without markers differ in their dashes, those with markers in one of both."""
    lab = LABS["continued"]
    panels = [[*arms] for arms in compared_arms(lab).values()] + [[lab.reference, *SHOWN]]
    for labels in panels:
        styles = label_styles(labels)
        assert len({str(style.dashes) for style in styles.values()}) == len(labels), labels
    for name in ("rate", "depth"):
        styles = label_styles([arm.label for arm in LABS[name].arms])
        assert len({style.marker for style in styles.values()}) == len(styles), name


def test_strategies_are_labelled_as_labs_name_them():
    assert {arm.label: arm.overrides[0].removeprefix("clip=") for arm in STRATEGIES} == STRATEGY_LABELS


def test_unknown_labels_share_no_style_with_others():
    labels = [*STRATEGY_STYLES, *(f"unknown {number}" for number in range(40))]
    styles = label_styles(labels)
    assert len({*styles.values()}) == len(labels) and styles == label_styles(labels)
    pairs = {(style.color, style.dashes) for style in label_styles(labels[:49]).values()}
    assert len(pairs) == 49
    with pytest.raises(ValueError, match="cannot have 1000 lines"):
        label_styles([str(number) for number in range(1000)])
    assert LineStyle("0.5", "-").marker == numbered_style(0).marker
