"""Figures from run folders."""

import io
from contextlib import suppress

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from common.errors import UserError
from experiments.claims.verdict import SUPPORTED, judge
from experiments.paper.claims import PAPER_CLAIMS
from experiments.paper.distributions import bin_edges, draw_distributions, norm_windows, window_norms
from experiments.paper.drawing import NothingToDraw, plot_differences, smooth
from experiments.paper.figures import FIGURES
from experiments.paper.render import fill_table, markdown
from experiments.paper.tables_and_figures import (
    ALPHAS,
    FIGURE_RUNS,
    SPIKE_LAB,
    STRATEGIES,
    TABLES,
    THRESHOLD_NOTE,
)
from experiments.run.collect import RunCollection
from experiments.run.read import corrupted_steps
from experiments.run.style import STRATEGY_STYLES, graded_styles, image, numbered_style
from scripts.paper_runs import draw_figures, figure3
from tests.experiments.written_runs import SEEDS, modify, without
from tests.helpers import SLOW


def test_lines_that_are_numbered_differ():
    assert len({(style.color, style.dashes) for style in map(numbered_style, range(49))}) == 49


def test_every_table_is_filled(everything):
    for table in TABLES.values():
        for label, cells in zip(table.rows, fill_table(table, everything).cells, strict=True):
            for column, cell in zip(table.columns, cells, strict=True):
                assert len(cell.values) == 3, (table.name, label, column.header)


def test_a_strategy_has_the_same_style_in_every_figure(figures):
    styles = {}
    labels = {
        "No clipping": "none",
        "Fixed 1.0": "fixed",
        "ZClip": "zclip",
        "AutoClip": "autoclip",
        "Reciprocal": "zclip",
    }
    for name in ("figure1", "table3", "figure4", "figure5", "figure6", "figure8"):
        for ax in figures[name].axes:
            for line in ax.lines:
                strategy = labels.get(str(line.get_label()).partition(" at ")[0])
                if strategy:
                    styles.setdefault(strategy, set()).add(line.get_color())
    assert styles == {name: {STRATEGY_STYLES[name].color} for name in ("none", "fixed", "zclip", "autoclip")}
    for label, ax in zip(SPIKE_LAB, figures["spike_lab"].axes, strict=False):
        assert ax.lines[0].get_color() == STRATEGY_STYLES[SPIKE_LAB[label]["corrupted"].clip].color, label
    assert len({(style.color, str(style.dashes)) for style in STRATEGY_STYLES.values()}) == len(STRATEGY_STYLES)


def test_values_of_one_setting_go_from_dark_to_light(figures):
    """Their order shows in grey too, and so do their dashes."""
    lines = figures["ema"].axes[0].lines[: len(ALPHAS)]
    greys = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in lines]
    assert greys == sorted(greys) and min(np.diff(greys)) > 0.05
    assert len({str(style.dashes) for style in graded_styles(len(ALPHAS))}) == len(ALPHAS)


def test_captions_describe_what_is_drawn(everything, figures):
    captions = {name: " ".join(figure.get_supxlabel().split()) for name, figure in figures.items()}
    assert all("; learning rates are 10 times those named" in text for text in captions.values())
    assert {name for name, text in captions.items() if "a line is the mean over seeds" not in text} == {"figure9"}
    assert {name for name, text in captions.items() if "a band goes from" not in text} == {"figure9", "ema"}
    assert {name for name, text in captions.items() if THRESHOLD_NOTE in text} == {"figure1", "figure4", "figure5"}
    one = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] == 1})
    assert "pico-tied, seed 1;" in caption("figure2", one) and "mean over seeds" not in caption("figure2", one)


def test_captions_name_missing_runs(everything, figures):
    modified = {(STRATEGIES["AutoClip"], 1), (STRATEGIES["ZClip"], 2)}
    collection = everything._replace(runs={key: run for key, run in everything.runs.items() if key not in modified})
    captions = {name: caption(name, collection) for name in FIGURES}
    assert "not run: AutoClip (seed 1), ZClip (seed 2)" in captions["table3"]
    assert {name for name, line in captions.items() if "not run" in line} == {
        "table3", "figure5", "figure7", "figure8", "ema",
    }  # fmt: skip
    assert all("not run" not in figure.get_supxlabel() for figure in figures.values())


def caption(name: str, collection: RunCollection) -> str:
    figure = FIGURES[name](collection)
    plt.close(figure)
    return figure.get_supxlabel()


def test_losses_are_compared_seed_by_seed(figures):
    """ZClip's five steps after a corrupted batch are 0.05, 0.055 and 0.06 higher, no clipping's 0.8, 0.88 and 0.96."""
    losses, minus = figures["table3"].axes
    assert [line.get_label() for line in losses.lines[:4]] == list(STRATEGIES)
    zclip = next(line for line in minus.lines if line.get_label() == "ZClip")
    step, difference = zclip.get_data()
    assert difference[step == 83] == pytest.approx(0.055 - 0.88) and difference[step == 70] == pytest.approx(0)
    band = np.concatenate([path.vertices for path in minus.collections[-1].get_paths()])
    assert sorted(set(band[band[:, 0] == 83][:, 1].round(3))) == [-0.9, -0.75]
    assert not losses.collections, "bands would hide each other"
    for ax in (losses, minus):
        corrupted = [
            line.get_xdata() for line in ax.lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2
        ]
        assert [x for x, _ in corrupted if x > 1] == [80, 100, 120]
    (alone,) = figures["figure2"].axes
    assert alone.collections, "with nothing to compare there is one"


def test_difference_of_two_runs_excludes_the_corrupted_batches_of_both(everything):
    corrupted, baseline = (everything.runs[SPIKE_LAB["ZClip"][group], 0] for group in ("corrupted", "baseline"))
    for pair in ((corrupted, baseline), (baseline, corrupted)):
        ax = plt.figure().subplots()
        plot_differences(ax, [pair], "difference", numbered_style(0))
        assert np.flatnonzero(np.isnan(drawn(ax, "difference"))).tolist() == [79, 99, 119]


def drawn(axes, label: str) -> np.ndarray:
    return next(line for line in axes.lines if line.get_label() == label).get_ydata()


def column(collection: RunCollection, spec, name: str) -> np.ndarray:
    return np.mean([collection.runs[spec, seed].metrics[name] for seed in SEEDS], axis=0)


def test_figures_show_norms_before_and_after_clipping(everything, figures):
    before, after = figures["figure7"].axes
    zclip = FIGURE_RUNS["figure7"]["ZClip"]
    assert np.allclose(drawn(before, "norm before"), column(everything, zclip, "grad_norm"))
    assert np.allclose(drawn(after, "norm after"), column(everything, zclip, "clipped_norm"))
    axes = figures["figure5"].axes
    assert [ax.get_ylabel() for ax in axes[::3]] == [f"learning rate {rate}" for rate in ("5e-3", "3e-3", "1e-3")]
    for row, rate in enumerate(("5e-3", "3e-3", "1e-3")):
        for label in ("Fixed 1.0", "ZClip"):
            spec = FIGURE_RUNS["figure5"][f"{label} at {rate}"]
            assert np.allclose(drawn(axes[3 * row + 1], label), column(everything, spec, "grad_norm"))
            assert np.allclose(drawn(axes[3 * row + 2], label), column(everything, spec, "clipped_norm"))


def test_statistics_are_drawn_after_warm_up(figures):
    mean, std = figures["ema"].axes
    for ax, value in ((mean, 0.4), (std, 0.1)):
        line = drawn(ax, "alpha 0.97")
        assert np.isnan(line[:25]).all() and np.allclose(line[25:], value)


def test_spike_lab_shows_the_loss_minus_the_baseline_runs(everything, figures):
    """Fixed clipping's five steps after a corrupted batch are 0.3, 0.33 and 0.36 above."""
    axes = {ax.get_title(): ax for ax in figures["spike_lab"].axes}
    _, above = axes["Fixed 1.0"].lines[0].get_data()
    assert above[82] == pytest.approx(0.33) and above[70] == pytest.approx(0) and len(axes) == 10
    corrupted = corrupted_steps(everything.runs[SPIKE_LAB["ZClip"]["corrupted"], 0])
    assert axes["ZClip"].get_xlim() == (corrupted[0] - 140 / 20, 140)


def test_spike_lab_has_a_panel_for_each_strategy_that_was_run(everything):
    specs = {spec for label in STRATEGIES for spec in SPIKE_LAB[label].values()}
    figure = FIGURES["spike_lab"](
        everything._replace(runs={k: run for k, run in everything.runs.items() if k[0] in specs})
    )
    assert [ax.get_title() for ax in figure.axes if ax.axison] == [*STRATEGIES] and len(figure.axes) == 6


def test_figure_4_labels_when_zclip_reaches_the_loss(everything):
    """Seed by seed: lines that fall to the same loss in 139 and in 69.5 steps; see test_claims.py for the 52 %."""
    fixed, zclip = FIGURE_RUNS["figure4"].values()
    takes = {fixed: (139, 139, 139), zclip: (69.5, 60, 50)}
    runs = {
        (spec, seed): run._replace(
            metrics={**run.metrics, "loss": 6 - np.arange(140) / takes.get(spec, (139,) * 3)[seed]}
        )
        for (spec, seed), run in everything.runs.items()
    }
    faster = everything._replace(runs=runs)
    (ax,) = FIGURES["figure4"](faster).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "ZClip reaches it with 52% fewer tokens" in labels and "corrupted batch" in labels
    final = 6 - 129.5 / 139
    assert drawn(ax, f"final loss of fixed clipping, {final:.2f}") == pytest.approx([final, final])
    verticals = [line.get_xdata()[0] for line in ax.lines if [*line.get_ydata()] == [0, 1]]
    assert sorted(verticals) == pytest.approx([(76 + 67 + 58) / 3, 80, 100, 120])
    apart = without(faster, (fixed, 0), (zclip, 1), (zclip, 2))
    labels = [text.get_text() for text in FIGURES["figure4"](apart).axes[0].get_legend().get_texts()]
    assert "no seed has both runs" in labels
    with pytest.raises(NothingToDraw, match="both strategies are needed"):
        FIGURES["figure4"](without(apart, (zclip, 0)))
    for diverged, label in (
        ((zclip, 0), "ZClip does not reach it with 1 of 3 seeds"),
        ((fixed, 1), "fixed clipping has diverged"),
    ):
        figure = FIGURES["figure4"](faster._replace(diverged={diverged}))
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert label in labels, "like the verdict"
    runs[fixed, 1] = runs[fixed, 1]._replace(metrics={**runs[fixed, 1].metrics, "loss": np.full(140, np.nan)})
    labels = [text.get_text() for text in FIGURES["figure4"](faster).axes[0].get_legend().get_texts()]
    assert "fixed clipping has diverged" in labels


def test_labels_name_the_number_of_seeds_if_it_differs(everything):
    modified = everything._replace(
        runs={key: run for key, run in everything.runs.items() if key != (STRATEGIES["ZClip"], 1)}
    )
    losses, _ = FIGURES["table3"](modified).axes
    assert [line.get_label() for line in losses.lines[2:4]] == ["AutoClip", "ZClip (2 of 3 seeds)"]
    assert "ZClip (2 of 3 seeds)" in [line.get_label() for line in FIGURES["figure5"](modified).axes[-1].lines]


def test_figure_3_shows_the_strategies_clipping_functions():
    figure = figure3()
    assert image(figure, "svg") == image(figure, "svg"), "equal figures are equal files"
    max_, mean, reciprocal = figure.axes[0].lines
    z = max_.get_xdata()
    assert np.allclose(max_.get_ydata(), np.minimum(z, 2.5), atol=1e-3)
    assert np.allclose(mean.get_ydata(), np.where(z > 2.5, 0, z), atol=1e-3)
    assert np.allclose(reciprocal.get_ydata(), np.where(z > 2.5, 2.5**2 / np.maximum(z, 1e-9), z), atol=1e-3)


def test_figure_9_shows_norms_of_a_run_without_corrupted_batches(everything, figures):
    axes = figures["figure9"].axes
    assert [ax.get_ylabel() for ax in axes[::4]] == ["steps 50 to 99\ndensity", "steps 100 to 140\ndensity"]
    baseline = everything.runs[FIGURE_RUNS["figure9"]["ZClip"], 0]
    assert not baseline.config["data"]["corruption"]["steps"]
    ordered = np.sort(baseline.metrics["grad_norm"][49:99])
    for ax, values in ((axes[1], ordered), (axes[3], np.log(ordered))):
        assert np.allclose(ax.lines[0].get_ydata(), values)
    fitted = axes[0].lines[0].get_ydata()
    assert fitted.max() == pytest.approx(1 / (ordered.std(ddof=1) * (2 * np.pi) ** 0.5), rel=1e-3)


def test_norms_of_figure_9_are_finite_and_without_those_of_corrupted_batches(everything):
    run = everything.runs[SPIKE_LAB["ZClip"]["corrupted"], 0]
    norms = run.metrics["grad_norm"].copy()
    norms[[81, 82]] = [np.nan, 0]
    window = window_norms(run._replace(metrics={**run.metrics, "grad_norm": norms}), 78, 85)
    assert window.tolist() == norms[[77, 78, 80, 83, 84]].tolist()


@pytest.fixture(scope="module")
def all_diverged(everything) -> RunCollection:
    """The runs of all experiments, whose numbers are NaN from step 61 on."""

    def change(spec, seed, run):
        metrics = {name: values.copy() for name, values in run.metrics.items()}
        for name in ("loss", "grad_norm", "clipped_norm"):
            metrics[name][60:] = np.nan
        return run._replace(metrics=metrics, result={**run.result, "train_loss": None, "test_loss": None})

    return modify(everything, change, diverged=everything.runs)


@pytest.mark.parametrize("name", [name if name in ("figure4", "figure7") else SLOW(name) for name in FIGURES])
def test_images_of_diverged_runs_are_written(name, all_diverged):
    image = io.BytesIO()
    FIGURES[name](all_diverged).savefig(image, format="png", dpi=30)
    assert len(image.getvalue()) > 2000


def test_diverged_runs_are_drawn_up_to_divergence(all_diverged):
    for name in FIGURES:
        assert FIGURES[name](all_diverged).axes, name
    assert np.isfinite(drawn(FIGURES["figure7"](all_diverged).axes[0], "norm before")).sum() == 60
    table3 = markdown(fill_table(TABLES["table3"], all_diverged))
    assert "| diverged |" in table3 and "Diverged: No clipping (seeds 0, 1, 2), Fixed 1.0 (seeds" in table3
    assert all(verdict.outcome != SUPPORTED for verdict in judge(PAPER_CLAIMS[2:7], all_diverged))


def test_figure_9_has_the_papers_windows_in_a_run_of_its_length(everything):
    run = next(iter(everything.runs.values()))
    long = run._replace(metrics={"step": np.arange(1, 11_901)})
    assert norm_windows(long) == [(500, 634), (3050, 3184)]
    assert norm_windows(run) == [(50, 99), (100, 140)]


@pytest.mark.parametrize(
    ("window", "message"), [((50, 400), "the run has 140 steps"), ((79, 80), "it has 2 norms, and 3 are needed")]
)
def test_windows_that_do_not_fit_are_rejected(window, message, everything):
    with pytest.raises(UserError, match=rf"windows=\[\[{window[0]},{window[1]}\]\] is not allowed: {message}"):
        draw_distributions(everything, [window])


def test_smoothing_never_spans_a_corrupted_batch():
    """Of 180 steps the mean of three; alone between two corrupted batches a step is itself."""
    values = np.arange(180.0)
    smoothed, width = smooth(np.where(values >= 91, values + 900, values), {88, 90})
    assert width == 3 and np.isnan(smoothed[[88, 90]]).all()
    assert smoothed[:3].tolist() == [0.5, 1.0, 2.0] and smoothed[[86, 87, 89]].tolist() == [86.0, 86.5, 89.0]
    assert smoothed[[91, 92, 179]].tolist() == [991.5, 992.0, 1078.5]
    first, _ = smooth(values, {0})
    assert np.isnan(first[0]) and first[1] == 1.5
    assert [smooth(np.zeros(steps))[1] for steps in (240, 300, 11_900)] == [5, 5, 9], "odd, and no more than nine"


def test_windows_of_figure_9_can_be_chosen(everything):
    windows = [[20, 70], [80, 90]]
    drawn_figures, not_drawn = draw_figures(["table2", "figure3", "figure9"], everything, windows)
    assert list(drawn_figures) == ["figure3", "figure9"] and not not_drawn
    assert [ax.get_ylabel() for ax in drawn_figures["figure9"].axes[::4]] == [
        "steps 20 to 70\ndensity",
        "steps 80 to 90\ndensity",
    ]
    assert "a window is up to 36% of the run" in drawn_figures["figure9"].get_supxlabel()


@pytest.mark.parametrize("name", ["figure5", *map(SLOW, ("figure1", "figure7", "figure8", "figure9", "ema"))])
def test_runs_without_a_number_can_be_drawn(name, everything):
    """Such a run had no finite step."""

    def without_numbers(spec, seed, run):
        return run._replace(metrics={c: v if c in ("step", "tokens") else v * np.nan for c, v in run.metrics.items()})

    specs = [*FIGURE_RUNS[name].values()][:2]
    few = everything._replace(runs={(spec, 0): everything.runs[spec, 0] for spec in specs})
    with suppress(NothingToDraw):
        assert image(FIGURES[name](modify(few, without_numbers)), "svg")


def test_histograms_of_outliers_and_of_equal_norms_have_few_bins():
    usual = np.linspace(1, 2, 50)
    assert bin_edges(usual).tolist() == np.histogram_bin_edges(usual, "auto").tolist()
    for outlier in (1e4, 1e12, 9e99):
        assert 3 <= len(bin_edges(np.append(usual, outlier))) <= 100
    for equal in (9e99, 1.0, 0.0, -700.0, 1e-320):
        low, high = bin_edges(np.full(5, equal))
        assert low < equal < high
