"""From run folders to figures and the report."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.catalogue import STRATEGIES, TABLES
from experiments.claims import SUPPORTED, verdicts
from experiments.collection import Found
from experiments.distributions import UnfitWindow, distributions, norm_windows
from experiments.figures import DRAWN, draw
from experiments.report import report, verdicts_in_markdown
from experiments.tables import fill, markdown


def test_every_table_is_filled_and_every_figure_drawn(everything, tmp_path):
    for table in TABLES.values():
        for row, cells in zip(table.rows, fill(table, everything).cells, strict=True):
            for column, cell in zip(table.columns, cells, strict=True):
                assert len(cell.values) == 3, (table.name, row.label, column.header)
    figures = {name: draw(name, everything) for name in DRAWN}
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=30)
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
    page = report(everything, list(TABLES.values()), figures, ["figure99"], "micro", ["make it so"], "Made today.")
    assert page.count("data:image/svg+xml;base64,") == len(DRAWN) and "figure99" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "it needs nothing else"
    assert "<b>" in page and "&lt;b&gt;" not in page and "norm of 14 times the" in page
    said = verdicts_in_markdown(verdicts(everything), "micro")
    assert said.count("\n## ") == 9 and "## Fixed clipping leaves spikes.\n\n**supported**\n\n- " in said


def test_figures_name_the_runs_that_are_missing(everything):
    gone = {(STRATEGIES["AutoClip"], 1), (STRATEGIES["ZClip"], 2)}
    found = everything._replace(runs={key: run for key, run in everything.runs.items() if key not in gone})
    said = {name: below(name, found) for name in DRAWN}
    assert "not run: AutoClip (seed 1), ZClip (seed 2)" in said["table3"]
    assert {name for name, line in said.items() if "not run" in line} == {
        "table3", "figure5", "figure7", "figure8", "ema",
    }  # fmt: skip
    assert all("not run" not in below(name, everything) for name in DRAWN)


def below(name: str, found: Found) -> str:
    figure = draw(name, found)
    plt.close(figure)
    return figure.get_supxlabel()


def test_losses_are_compared_seed_by_seed(everything):
    """ZClip's five steps after a bad batch are 0.05, 0.055 and 0.06 above, those of no clipping 0.8, 0.88 and 0.96."""
    losses, minus = draw("table3", everything).axes
    assert [line.get_label() for line in losses.lines[:4]] == list(STRATEGIES)
    zclip = next(line for line in minus.lines if line.get_label() == "ZClip")
    step, difference = zclip.get_data()
    assert difference[step == 83] == pytest.approx(0.055 - 0.88) and difference[step == 70] == pytest.approx(0)
    band = minus.collections[-1].get_paths()[0].vertices
    assert sorted(set(band[band[:, 0] == 83][:, 1].round(3))) == [-0.9, -0.75]
    assert len(draw("figure2", everything).axes) == 1, "with nothing to compare"


def test_runs_that_diverged_are_drawn_as_far_as_they_went(everything, tmp_path):
    gone = {}
    for key, run in everything.runs.items():
        metrics = {name: column.copy() for name, column in run.metrics.items()}
        for name in ("loss", "grad_norm", "clipped_norm"):
            metrics[name][60:] = np.nan
        gone[key] = run._replace(metrics=metrics, result={**run.result, "train_loss": None, "test_loss": None})
    found = everything._replace(runs=gone, diverged=set(gone))
    for name in DRAWN:
        draw(name, found).savefig(tmp_path / f"{name}.png", dpi=30)
    table3 = markdown(fill(TABLES["table3"], found))
    assert "| diverged |" in table3 and "Diverged: No clipping (seed 0)" in table3
    assert all(verdict.verdict != SUPPORTED for verdict in verdicts(found)[2:7])


def test_the_windows_of_figure_9_are_the_papers_in_a_run_of_its_length(everything):
    run = next(iter(everything.runs.values()))
    long = run._replace(metrics={"step": np.arange(1, 11_901)})
    assert norm_windows(long) == [(500, 634), (3050, 3184)]
    assert norm_windows(run) == [(50, 99), (100, 140)]


@pytest.mark.parametrize(
    ("window", "said"), [((50, 400), "the run has 140 steps"), ((79, 81), "it has 2 norms, and 3 are needed")]
)
def test_windows_that_do_not_fit_are_refused(window, said, everything):
    with pytest.raises(UnfitWindow, match=rf"windows=\[\[{window[0]},{window[1]}\]\] is not allowed: {said}"):
        distributions(everything, [window])
