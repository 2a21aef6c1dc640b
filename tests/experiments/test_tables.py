"""Tables from runs: cells, footnotes, and the formats of their files."""

from pathlib import Path

import numpy as np
import pytest

from experiments.escape import escape_latex
from experiments.paper.footnotes import describe_runs
from experiments.paper.measures import MEASURES, clip_and_step_seconds
from experiments.paper.render import as_csv, fill_table, latex, markdown
from experiments.paper.tables_and_figures import SPIKE_LAB, STRATEGIES, TABLES
from experiments.run.collect import collect
from training.config.compose import saved_identity


@pytest.mark.parametrize("name", TABLES)
def test_tables_match_golden_files(name, everything):
    """The golden files were checked by hand against the runs. Write them again when a table is to change."""
    assert (
        markdown(fill_table(TABLES[name], everything)) == (Path(__file__).parent / "tables" / f"{name}.md").read_text()
    )


def test_cells_with_fewer_seeds_say_so_and_are_never_best(everything):
    others = {(STRATEGIES["ZClip"], seed) for seed in (1, 2)}
    collection = everything._replace(runs={key: run for key, run in everything.runs.items() if key not in others})
    text = markdown(fill_table(TABLES["table3"], collection))
    assert "| 4.950 (1 of 3 seeds) |" in text and "**4.965 ± 0.015**" in text, text


def test_best_cells_are_compared_on_the_same_seeds(everything):
    """Fixed clipping lacks the worst seed, and ZClip the best: neither is compared."""
    missing = {(STRATEGIES["Fixed 1.0"], 2), (STRATEGIES["ZClip"], 0)}
    losses = {"No clipping": 7.0, "Fixed 1.0": 4.1, "AutoClip": 6.0, "ZClip": 4.0}
    runs = {key: run for key, run in everything.runs.items() if key not in missing}
    for label, loss in losses.items():
        for seed in (0, 1, 2):
            if (key := (STRATEGIES[label], seed)) in runs:
                runs[key] = runs[key]._replace(result={**runs[key].result, "test_loss": loss + seed})
    text = markdown(fill_table(TABLES["table3"], everything._replace(runs=runs)))
    assert "| 4.600 ± 0.707 (2 of 3 seeds) |" in text and "| **7.000 ± 1.000** |" in text, text


def test_cells_without_a_number_name_diverged_runs(everything):
    runs = {key: run._replace(scores=()) for key, run in everything.runs.items()}
    table = TABLES["table3"]
    for seeds, text in (((1,), "| 1 diverged | "), ((0, 1, 2), "| diverged | ")):
        collection = everything._replace(runs=runs, diverged={(STRATEGIES["AutoClip"], seed) for seed in seeds})
        (row,) = (row for row in markdown(fill_table(table, collection)).splitlines() if row.startswith("| AutoClip |"))
        assert row.count(text) == 2, row


def test_diverged_baseline_run_is_not_compared_with(everything):
    runs = everything.runs | {
        (SPIKE_LAB["AutoClip"]["corrupted"], seed): run._replace(result={**run.result, "test_loss": 4.0})
        for seed in (0, 1, 2)
        for run in (everything.runs[SPIKE_LAB["AutoClip"]["corrupted"], seed],)
    }
    collection = everything._replace(runs=runs, diverged={(SPIKE_LAB["AutoClip"]["baseline"], 1)})
    (row,) = (
        row
        for row in markdown(fill_table(TABLES["spike_lab"], collection)).splitlines()
        if row.startswith("| AutoClip |")
    )
    assert row.count("(1 diverged)") == 5 and row.count("**") == 2, "the corrupted run's own loss is not affected"
    key = (SPIKE_LAB["ZClip"]["corrupted"], 1)
    loss = everything.runs[key].metrics["loss"].copy()
    loss[83] = float("nan")
    runs = everything.runs | {
        key: everything.runs[key]._replace(metrics={**everything.runs[key].metrics, "loss": loss})
    }
    text = markdown(fill_table(TABLES["spike_lab"], everything._replace(runs=runs)))
    assert "| ZClip | 0.027 ± 0.004 (1 diverged, 2 of 3 seeds) |" in text and "whose losses are not finite" in text
    fewer = {other: run for other, run in everything.runs.items() if other != key}
    assert "Not run: ZClip, with corrupted batches (seed 1)." in markdown(
        fill_table(TABLES["spike_lab"], everything._replace(runs=fewer))
    )


def test_footnote_names_all_steps_of_corrupted_batches(everything):
    """One list of steps may begin as another."""
    runs = dict(everything.runs)
    key = next(key for key, run in runs.items() if run.config["data"]["corruption"]["steps"])
    config = {
        **runs[key].config,
        "data": {**runs[key].config["data"], "corruption": {"steps": [80], "kind": "repeat"}},
    }
    text = describe_runs([runs[key], runs[key]._replace(config=config)], [0])
    assert "injected at steps 80, corrupted batches of kind repeat injected at steps 80, 100, 120" in text


def test_footnote_describes_scale_commit_and_sizes(everything):
    """999,900 parameters are a million, and a rate that is the paper's is named once."""
    run = everything.runs[STRATEGIES["ZClip"], 0]
    config = {**run.config, "paper": {**run.config["paper"], "lr_scale": 1}}
    start = {"commit": "abcdefgh1", "uncommitted_changes": True}
    text = describe_runs(
        [run._replace(config=config, starts=[start], result={**run.result, "parameters": 999_900})], [0]
    )
    assert "(1M parameters), 287k tokens" in text and ", learning rate 0.001 in the paper, corrupted" in text
    assert text.endswith(", commit abcdefgh with uncommitted changes")


def test_footnote_describes_the_items_behind_scores(everything):
    runs = {
        key: run._replace(scores=[{**run.scores[0], "items": 50 + 50 * key[1], "truncated_fraction": 0.004 * key[1]}])
        for key, run in everything.runs.items()
    }

    def text(runs):
        return markdown(fill_table(TABLES["table3"], everything._replace(runs=runs)))

    assert "- Scored: HellaSwag on 50 or 100 or 150 items.\n- At this scale HellaSwag and WinoGrande are at" in text(
        runs
    )
    assert "25 and 50, with a standard error of up to 4.0" in text(runs) and "passages" not in text(runs).replace(
        "held-out passages", ""
    )
    assert "items.\n- The standard error of these scores is up to 4.0, and chance is 25 and 50." in text(at_proxy(runs))
    assert "- Up to 1% of the texts are longer than the context, and are truncated." in text(runs)
    assert "truncated" not in text({key: run for key, run in runs.items() if key[1] < 2}), "less than half a percent"


def at_proxy(runs: dict) -> dict:
    """Return the runs as if they were of the scale of 60 million parameters."""
    return {
        key: run._replace(config=run.config | {"paper": run.config["paper"] | {"scale": "proxy"}})
        for key, run in runs.items()
    }


def test_scores_that_are_chance_are_never_best(everything):
    """The others are: losses at every scale, and the same scores at a larger one."""
    guessed, larger = (
        markdown(fill_table(TABLES["table3"], everything._replace(runs=runs)))
        for runs in (everything.runs, at_proxy(everything.runs))
    )
    assert "| 59.70 ± 0.00 | **54.85** |" in guessed and "| **59.70 ± 0.00** | **54.85** |" in larger
    assert all("| **5.555 ± 0.005** |" in text for text in (guessed, larger)), "the last-word loss"
    assert all("| **2.414 ± 0.001** |" in text for text in (guessed, larger)), "bits per byte"


def test_measures_that_a_run_does_not_have_are_unknown(everything):
    corrupted, baseline = (everything.runs[SPIKE_LAB["ZClip"][group], 0] for group in ("corrupted", "baseline"))
    increase = MEASURES["test_loss_increase"].compute
    assert increase(corrupted, baseline) == pytest.approx(0.05) and increase(baseline, baseline) is None
    assert increase(corrupted, None) is increase(corrupted, baseline._replace(result={})) is None
    short = {name: column[:50] for name, column in baseline.metrics.items()}
    assert MEASURES["spikes"].compute(baseline._replace(metrics=short), None) is None, "no step can be one"
    assert MEASURES["spikes"].compute(baseline, None) == 0
    unclipped = {name: column for name, column in corrupted.metrics.items() if name != "spike"}
    assert MEASURES["clipped_by_z"].compute(corrupted._replace(metrics=unclipped), None) is None
    for seconds in ({}, {"clip": 0.0, "optimizer": 0.0}, {"optimizer": 1.0}):
        assert clip_and_step_seconds(corrupted._replace(result={"step_seconds": seconds})) is None


def test_share_of_clipped_steps_excludes_corrupted_and_nonfinite_ones(everything):
    """14 of 140 steps are clipped; one of them is not finite, and three others are corrupted."""
    run = everything.runs[SPIKE_LAB["ZClip"]["corrupted"], 0]
    norms, clipped = run.metrics["grad_norm"].copy(), run.metrics["clipped"].copy()
    norms[0], clipped[[79, 99, 119]] = np.nan, 1.0
    modified = run._replace(metrics={**run.metrics, "grad_norm": norms, "clipped": clipped})
    assert MEASURES["clipped"].compute(modified, None) == pytest.approx(100 * 13 / 137)


def test_count_of_one_run_is_an_integer(everything):
    one = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] == 0})
    text = markdown(fill_table(TABLES["table3"], one))
    assert "| Fixed 1.0 | 0 | 6 | 0.00 |" in text and "standard deviation over seeds" not in text


def test_latex_escapes_every_special_character(everything):
    assert escape_latex(r"\ { } $ & # ^ _ % ~ ±") == (
        r"\textbackslash{} \{ \} \$ \& \# \textasciicircum{} \_ \% \textasciitilde{} $\pm$"
    )
    table = TABLES["throughput"]._replace(
        row_header="50% of $x_1^2$", rows={"No clipping": TABLES["throughput"].rows["No clipping"]}
    )
    text = latex(fill_table(table, everything))
    assert r"50\% of \$x\_1\textasciicircum{}2\$ & million tokens/hour & clipping, \% of a step \\" in text
    assert r"No clipping & 36.00 $\pm$ 0.00 & 2.00 $\pm$ 0.00 \\" in text


def test_latex_and_csv(table3):
    _, expected = table3
    filled = fill_table(TABLES["table3"], collect(expected, saved_identity))
    assert "No clipping & 3.0 $\\pm$ 0.0 & 12 &" in latex(filled) and "\\textbf{4.910 $\\pm$ 0.010}" in latex(filled)
    rows = as_csv(filled).splitlines()
    assert rows[0] == "table,row,column,paper,mean,std,runs,diverged"
    assert "table3,No clipping,test loss,2.9,6.91,0.01,3,0" in rows
    (row,) = (row for row in rows if row.startswith("table3,ZClip,WinoGrande,"))
    assert row.endswith(",51,1,3,0"), "the scores on most items"
