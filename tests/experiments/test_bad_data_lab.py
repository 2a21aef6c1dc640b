"""The lab on bad batches: what they cost, by kind, and what its report says."""

import csv
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.labs.bad_data import bad_data_numbers, bad_data_results
from experiments.labs.bad_data_figures import BEFORE, around_bad_batches
from experiments.labs.bad_data_report import bad_data_report
from experiments.labs.declaration import LABS
from experiments.run.collect import RunCollection
from experiments.run.read import Run, corruption_kinds
from tests.experiments.written_runs import composed, write_lab_run
from tests.helpers import compose_config, script

LAB = LABS["bad_data"]
STEPS = 200
#: Bad batches, with which every kind comes once.
BAD = (110, 120, 121, 150, 170, 195)


def made_run(loss, steps=BAD, clipped=(), test_loss=4.0, **columns):
    """Return a run with bad batches at some steps; `clipped` are the steps that are clipped."""
    step = np.arange(1, len(loss) + 1)
    metrics = {"step": step.astype(float), "loss": np.asarray(loss, float), "clipped": np.isin(step, clipped) * 1.0}
    config = {"seed": 0, "data": {"corruption": {"steps": list(steps), "kind": "mixed"}}}
    result = {"steps": len(loss), "test_loss": test_loss}
    return Run(Path("run"), config, metrics | columns, result, [], [], [])


def calm(seed=0):
    return np.linspace(6, 4, STEPS) + np.random.default_rng(seed).normal(0, 0.05, STEPS)


def with_bumps(height, seed=0):
    """Return the losses of `calm`, with other ones at bad batches and `height` nats more in the 4 steps after each."""
    bump = np.zeros(STEPS)
    for step in BAD:
        bump[step : step + 4] = height
    loss = calm(seed) + bump
    loss[[step - 1 for step in BAD]] = 9.0
    return loss


def test_numbers_are_differences_from_the_same_arm_without_bad_batches():
    """Step 120 has no step of its own after it. Of the 10 steps after a bad batch, 4 are 0.5 above; of 5, 4 are."""
    run = made_run(with_bumps(0.5), clipped=(5, 50, 110, 120, 170), test_loss=4.25)
    clean = made_run(calm(), steps=(), clipped=(5, 50))
    numbers = bad_data_numbers(run, clean, made_run(calm(1), steps=(), test_loss=3.9))
    after = {110: 0.5 * 4 / 9, 121: 0.2, 150: 0.2, 170: 0.2, 195: 0.5 * 4 / 5}
    assert numbers.excess == pytest.approx(np.mean([*after.values()]))
    assert sorted(numbers.rise_of) == sorted({"random", "repeat", "foreign_script", "labels", "repeated_ngrams"})
    assert sorted(numbers.rise_of.values()) == pytest.approx(sorted(after.values()))
    assert numbers.final == pytest.approx(0.25) and numbers.cost == pytest.approx(0.1)
    assert numbers.area == pytest.approx(0.5 * 4 * 5), "the steps after 120 are those after 121"
    assert numbers.recognised == pytest.approx(3 / 6) and numbers.acted == pytest.approx(2 / 200)


def test_cost_of_skipping_is_that_of_fewer_steps_on_the_slope_of_the_clean_run():
    """After the n-th of six bad batches the run is n steps behind; the second and third are consecutive."""
    clean = made_run(np.linspace(6, 4, STEPS), steps=())
    numbers = bad_data_numbers(made_run(with_bumps(0.5)), clean, clean)
    assert numbers.skip_cost == pytest.approx(2 / 199 * np.mean([1, 3, 4, 5, 6]))


def numbers_of(run):
    """Return the numbers of a run whose arm and reference arm have the losses of `calm`."""
    clean = made_run(calm(), steps=())
    return bad_data_numbers(run, clean, clean)


def test_rise_is_above_the_five_steps_before_the_bad_batch():
    loss = with_bumps(0.5)
    loss[144:149] += [0.1, 0.2, 0.3, 0.4, 0.5]
    numbers = numbers_of(made_run(loss))
    assert numbers.rise_of[corruption_kinds(made_run(loss))[150]] == pytest.approx(0.5 * 4 / 10 - 0.3)


@pytest.mark.parametrize("column", ["update_clipped", "masked_rows"])
def test_masked_and_slowed_steps_are_recognised(column):
    values = np.isin(np.arange(1, STEPS + 1), BAD[:2]) * 8.0
    run = made_run(calm(), **{column: values})
    assert numbers_of(run).recognised == pytest.approx(2 / 6)


def test_loss_of_a_run_that_diverges_is_at_most_that_of_the_untrained_model():
    loss = calm()
    loss[130:] = np.nan
    numbers = numbers_of(made_run(loss, test_loss=None))
    assert math.isfinite(numbers.excess) and numbers.excess > 0.5
    assert numbers.final == pytest.approx(calm()[0] - 4.0)


def test_curve_around_bad_batches_ends_at_the_next_one():
    kind = corruption_kinds(made_run(calm()))[150]
    only = around_bad_batches([(made_run(with_bumps(0.5)), made_run(calm(), steps=()))], kind)
    assert len(only) == BEFORE + 21 and np.isnan(only[BEFORE]) and only[BEFORE + 1 : BEFORE + 5] == pytest.approx(0.5)
    assert only[BEFORE + 5 : BEFORE + 20] == pytest.approx(0, abs=1e-12) and np.isnan(only[BEFORE + 20])
    assert np.isfinite(only[:BEFORE]).all()
    kind = corruption_kinds(made_run(calm()))[110]
    short = around_bad_batches([(made_run(with_bumps(0.5)), made_run(calm(), steps=()))], kind)
    assert np.isfinite(short[BEFORE + 1 : BEFORE + 10]).all() and np.isnan(short[BEFORE + 10 :]).all()


def arm_of(label):
    return next(arm for arm in LAB.arms if arm.label == label)


def collection(**bumps):
    """Return runs of three seeds with bumps after bad batches, and those without bad batches."""
    runs = {}
    for seed in range(3):
        for label, height in bumps.items():
            arm = arm_of(label.replace("_", " "))
            cost = {"ZClip": -0.1, "AGC": 0.001, "brake": 0.2}.get(arm.label, 0.0)
            runs[LAB.clean(arm), seed] = made_run(calm(seed), steps=(), test_loss=4.0 + cost + seed / 10)
            loss = with_bumps(height + seed / 1000, seed)
            runs[arm, seed] = made_run(loss, clipped=BAD[:3], test_loss=4.1 + cost + seed / 10)
    return RunCollection(runs, set(), {}, [], frozenset())


def test_report_compares_arms_and_kinds():
    written = bad_data_report(LAB, collection(no_clipping=0.8, ZClip=0.1, AGC=0.81, brake=2.0), "Read today.")
    share = np.mean([4 / 9, 0.4, 0.4, 0.4, 0.8])
    assert f"With no clipping, the excess loss after bad batches is {0.801 * share:.3f} nats." in written.text
    for sentence, arm in (
        ("Lower by more than 0.02", "ZClip -"),
        ("Within 0.02", "AGC 0.00"),
        ("Higher by more than 0.02", "brake 0."),
        ("the test loss is lower by more than 0.005", "ZClip -0.1"),
        ("the test loss is within 0.005", "AGC 0.001"),
        ("the test loss is higher by more than 0.005", "brake 0.2"),
    ):
        assert sentence in written.text and arm in written.text.split(sentence)[1].split("\n")[0], sentence
    assert re.search(r"skips exactly the bad batches would have 0\.0[3-4]\d nats \(estimated\)", written.text)
    assert "| ZClip |" in written.text and "| 50 |" in written.text, "three of six bad batches are recognised"
    assert "not run: fixed 1.0 (seeds 0, 1, 2)" in written.text
    assert "fixed 1.0 without bad batches (seeds 0, 1, 2)" in written.text
    rows = list(csv.DictReader(written.numbers.splitlines()))
    assert len(rows) == 12 and float(rows[0]["excess"]) == pytest.approx(0.8 * share, abs=1e-5)
    assert float(rows[0]["final"]) == pytest.approx(0.1) and len([k for k in rows[0] if k.startswith("rise_")]) == 5
    (excess,) = written.figures["excess"].axes
    assert [label.get_text() for label in excess.get_yticklabels()] == ["brake", "AGC", "no clipping", "ZClip"]
    assert len(written.figures["after"].axes) == 5
    labels = [line.get_label() for line in written.figures["after"].axes[0].lines if line.get_label()[0] != "_"]
    assert labels == ["no clipping", "ZClip", "brake"]
    for figure in written.figures.values():
        plt.close(figure)


def test_report_without_runs_without_bad_batches_says_so():
    runs = {key: run for key, run in collection(ZClip=0.1).runs.items() if key[0] in LAB.arms}
    left = RunCollection(runs, set(), {}, [], frozenset())
    assert bad_data_results(LAB, left) == []
    written = bad_data_report(LAB, left, "Read today.")
    assert "No arm has a run of a seed with bad batches, and one without them." in written.text and not written.figures


def test_kinds_are_drawn_equally_often_and_fit_the_run():
    """A pico model is declared; each seed has other steps, and clean runs have none."""
    config = compose_config(f"experiment={LAB.name}")
    counts = [list(config.corrupted_batches.values()).count(kind) for kind in set(config.corrupted_batches.values())]
    assert counts == [4] * 5 and min(config.corrupted_batches) >= 150
    assert config.data.sequence_length >= 415, "all periods of repeated n-grams fit"
    assert not compose_config(f"experiment={LAB.name}", *LAB.clean(LAB.arms[0]).overrides).corrupted_batches


@pytest.mark.slow
def test_script_writes_the_report_of_runs_on_disk(tmp_path):
    steps = composed(f"experiment={LAB.name}").trainer.max_steps
    loss = np.linspace(6, 4, steps)
    for arm in (LAB.arms[0], LAB.arms[-1]):
        write_lab_run(tmp_path / "runs", LAB, arm, 0, loss + 0.1 * (arm is LAB.arms[0]), np.ones(steps))
        write_lab_run(tmp_path / "runs", LAB, LAB.clean(arm), 0, loss, np.ones(steps))
    done = script("make_lab.py", "lab=bad_data", "runs=runs", "out=out", "seeds=[0]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "With no clipping, the excess loss after bad batches is 0.100 nats." in text
    for name in ("excess", "kinds", "after"):
        assert f"({name}.png)" in text and (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
