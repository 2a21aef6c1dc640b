"""The lab on changes in the middle of a run: its numbers, its claim, its runs and what its report says."""

import csv
import io
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.labs.continued import (
    OPEN,
    REFUTED,
    SUPPORTED,
    compared_arms,
    continued_numbers,
    continued_results,
    fork_step,
    judge_brake,
)
from experiments.labs.continued_report import continued_report
from experiments.labs.declaration import LABS, Fork, arm_of
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.suites import SUITES
from scripts._declared import find_declared
from tests.experiments.written_runs import composed
from tests.helpers import compose_config, script, start, train
from training.config.compose import resolve_runs
from training.config.identity import run_name

LAB = LABS["continued"]
STEPS, FORK = 1400, 200


def made_run(loss, scale=None, clipped=()):
    """Return a run that begins after step 200 of another."""
    step = np.arange(1, len(loss) + 1)
    metrics = {"step": step.astype(float), "loss": np.asarray(loss, float), "clipped": np.isin(step, clipped) * 1.0}
    metrics |= {"update_norm": 20.0 + 0 * step}
    if scale is not None:
        metrics |= {"update_scale": scale, "update_clipped": np.diff(scale, prepend=1.0) < 0}
    config = {"fork_from": f"pico-none-lr0.01@{FORK}", "clip": {}}
    return Run(Path("run"), config, metrics, {"steps": len(loss)}, [], [], [])


def falling(seed=0, cost=0.0):
    loss = np.linspace(6, 1, STEPS) + np.random.default_rng(seed).normal(0, 0.01, STEPS)
    loss[FORK:] += cost
    return loss


def braked(lowest_at, returned_at, steps=STEPS):
    """Return scales that are 1, but from one step after the fork to another, where they rise from 0.2 to 0.95."""
    scale = np.ones(steps)
    scale[FORK + lowest_at - 1 : FORK + returned_at - 1] = np.linspace(0.2, 0.85, returned_at - lowest_at)
    return scale


def test_numbers_are_those_of_the_steps_after_the_fork():
    loss = falling()
    numbers = continued_numbers(made_run(loss, braked(50, 650), clipped=(7, 260)))
    assert numbers.loss == pytest.approx(sum(loss[FORK:]) / (STEPS - FORK))
    assert numbers.early == pytest.approx(sum(loss[FORK : FORK + 100]) / 100)
    assert numbers.acted == pytest.approx(2 / (STEPS - FORK)), "it clips once, and the rule lowers the rate once"
    slope = 0.65 / 599
    assert numbers.scales == pytest.approx((0.2 + 50 * slope, 0.2 + 450 * slope, 1.0))
    assert (numbers.lowest, numbers.returned) == (0.2, 650)


def test_rate_that_has_not_returned_takes_for_ever_and_one_that_never_left_no_step():
    assert continued_numbers(made_run(falling(), np.ones(STEPS))).returned == 0
    assert continued_numbers(made_run(falling(), braked(50, STEPS - FORK + 1))).returned == math.inf
    last = braked(50, 650)
    last[FORK + 899] = 0.5
    assert continued_numbers(made_run(falling(), last)).returned == 901, "what counts is when it is back for good"
    without = continued_numbers(made_run(falling()))
    assert np.isnan((*without.scales, without.lowest, without.returned)).all()


def test_finite_losses_count_as_they_are_and_others_as_that_of_the_untrained_model():
    loss = falling()
    loss[FORK:] = [np.nan, *[3 * loss[0]] * (len(loss) - FORK - 1)]
    numbers = continued_numbers(made_run(loss))
    assert numbers.early == pytest.approx(loss[0] * (1 + 3 * 99) / 100)


def test_run_that_begins_at_its_first_step_has_no_fork():
    run = made_run(falling())
    assert fork_step(run) == FORK
    with pytest.raises(ValueError, match="run begins at its first step"):
        fork_step(run._replace(config={"fork_from": None}))


def collection(seeds=(0, 1, 2, 3), **costs):
    """Return runs in which the brake costs so many nats for each change, and ZClip nothing."""
    runs = {}
    for name, arms in compared_arms(LAB).items():
        for label, arm in arms.items():
            for seed in seeds:
                cost = costs.get(name.replace(" ", "_"), 0.0) if label == "brake" else 0.0
                noise = 0.0003 * np.sin(7 * seed + len(label))
                scale = braked(50, 650) if "brake" in label else None
                runs[arm, seed] = made_run(falling(seed, cost + noise), scale)
    return RunCollection(runs, set(), {}, [], frozenset())


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        ({}, SUPPORTED),
        ({"new_text": -0.1}, SUPPORTED),
        ({"new_text": 0.02}, REFUTED),
        ({"longer_context": 0.02}, REFUTED),
        ({"longer_context": 0.005}, OPEN),
        ({"decay_of_the_rate": 0.1, "nothing_changes": 0.1}, SUPPORTED),
    ],
)
def test_claim_is_about_rises_that_should_be(costs, verdict):
    assert judge_brake(LAB, continued_results(LAB, collection(**costs))) == verdict


def test_rise_on_which_the_brake_does_not_act_tests_nothing():
    runs = collection()
    arm = LAB.continued(arm_of(LAB.arms, "brake"), "new text")
    for seed in (0, 1, 2, 3):
        runs.runs[arm, seed] = made_run(falling(seed), np.ones(STEPS))
    assert judge_brake(LAB, continued_results(LAB, runs)) == OPEN


def test_claim_needs_both_rises_and_three_seeds():
    assert judge_brake(LAB, continued_results(LAB, collection(seeds=(0, 1)))) == OPEN
    runs = collection()
    arm = LAB.continued(arm_of(LAB.arms, "brake"), "longer context")
    left = {key: run for key, run in runs.runs.items() if key[0] != arm}
    assert judge_brake(LAB, continued_results(LAB, runs._replace(runs=left))) == OPEN


def test_report_has_the_claim_and_a_table_for_each_way_to_go_on():
    written = continued_report(LAB, collection(new_text=0.02), "Read today.")
    assert (
        "The claim that the brake costs at most 0.005 nats where norms rise for a good reason is refuted."
        in written.text
    )
    assert "New text: the mean loss is higher by more than 0.005 nats with: brake 0.02 (" in written.text
    assert "By hand: the mean loss is within 0.005 nats of it with: half the rate by hand" in written.text
    for heading in ("Nothing changes", "New text", "Longer context", "Decay of the rate", "By hand"):
        assert f"\n## {heading}\n" in written.text
    assert "train.py -m experiment=continued_lab seed=0,1,2,3" in written.text and [*written.figures] == ["forks"]
    rows = [*csv.DictReader(io.StringIO(written.numbers))]
    assert len(rows) == 4 * (4 * 4 + 2 * 2 + 4)
    (row,) = (r for r in rows if (r["change"], r["arm"], r["seed"]) == ("new text", "brake", "2"))
    assert row["returned"] == "650" and "fork_data=new" in row["overrides"]
    axes = np.array(written.figures["forks"].axes).reshape(4, 5)
    lines = {line.get_label(): line.get_xdata() for line in axes[3, 1].get_lines()}
    assert lines["brake"][0] == 1 - 100 and lines["brake"][-1] == STEPS - FORK and "ZClip" not in lines
    differences = {line.get_label(): line.get_ydata() for line in axes[1, 1].get_lines()}
    assert differences["brake"][-1] == pytest.approx(0.02, abs=0.001) and LAB.reference not in differences


def test_report_without_forked_runs_says_what_is_missing():
    runs = {(LAB.arms[0], 0): made_run(falling())}
    written = continued_report(LAB, RunCollection(runs, set(), {}, [], frozenset()), "Read today.")
    assert "is not decided by these runs" in written.text and not written.figures
    assert "not run: ZClip (seed 0)" in written.text


def test_runs_of_the_lab_are_named_by_what_they_begin_after():
    """A run's name has the name of the other, so that other settings make other runs."""
    assert SUITES["continued_lab"].runs == [arm.overrides for arm in LAB.runs[:5]]
    assert [run for run, _ in SUITES["continued_lab"].forked] == [a.overrides for a in LAB.runs if a.fork is not None]
    assert len({*LAB.runs}) == len(LAB.runs) == 28 and all(arm.fork == Fork(arm.fork.overrides) for arm in LAB.runs[5:])
    base = ("experiment=continued",)
    arm = LAB.continued(arm_of(LAB.arms, "brake"), "new text")
    runs = {arm: ((*base, *arm.overrides), ((*base, *arm.fork.overrides), arm.fork.times))}
    path, identity = resolve_runs(runs, [3])[arm, 3]
    other = compose_config(*base, *arm.fork.overrides, "seed=3")
    assert identity["fork_from"] == f"{run_name(other)}@1250" and identity["trainer"]["max_steps"] == 2500
    forked = (f"fork_from={run_name(other)}@1250", "trainer.max_steps=2500", "seed=3")
    assert path.name == run_name(compose_config(*base, *arm.overrides, *forked))


def test_base_warms_up_in_fifty_steps_and_the_decay_begins_at_the_fork():
    base = compose_config("experiment=continued")
    assert (base.optim.warmup_fraction * base.trainer.max_steps, base.optim.final_lr_fraction) == (50, 1)
    assert base.data.sequence_length == 32 and base.model.max_position_embeddings == 64
    decay = LAB.changes["decay of the rate"]
    assert "optim.warmup_fraction=0.5" in decay, "the run is twice as long as the one before"
    lag = composed("experiment=adam_lag")
    same = ("lr", "seed")
    assert all(getattr(base, key) == lag[key] for key in same) and lag.data.max_tokens == base.data.max_tokens


#: Settings of runs of the lab that take half a second.
SHORT = ("trainer.max_steps=8", "trainer.checkpoint_every=8", "data.max_val_tokens=2048", "seed=0")


@pytest.mark.slow
def test_lab_is_trained_interrupted_archived_and_reported(tmp_path):
    """The commands of a user, small: a run whose base is archived counts as finished."""
    sweep = ("-m", "experiment=continued_lab", *SHORT)
    job = start(*sweep, cwd=tmp_path)
    runs = tmp_path / "runs" / "continued"
    while len([*runs.glob("*/result.json")]) < 6 and job.poll() is None:
        time.sleep(0.1)
    job.terminate()
    job.wait()
    assert 6 <= len([*runs.glob("*/result.json")]) < len(LAB.runs)
    done = train(*sweep, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("finished already") >= 6, done.stderr
    assert len([*runs.glob("*/result.json")]) == len(LAB.runs) and "on new data from step 9 on" in done.stdout
    assert script("archive.py", "experiment=continued", "archives=kept", cwd=tmp_path).returncode == 0
    shutil.rmtree(runs)
    restored = script("archive.py", "experiment=continued", "archives=kept", "restore=true", cwd=tmp_path)
    assert f"{len(LAB.runs)} runs restored" in restored.stdout, restored.stderr
    again = train(*sweep, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("finished already") == len(LAB.runs), again.stderr
    overrides = "overrides=[" + ",".join(f"'{setting}'" for setting in SHORT[:3]) + "]"
    made = script("make_lab.py", "lab=continued", "seeds=[0]", overrides, "out=out", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert f"{len(LAB.runs)} runs are finished, seed 0." in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "forks.png").read_bytes().startswith(b"\x89PNG")
    brakes = runs.glob("pico-none-brake-*")
    shutil.rmtree(next(path for path in brakes if "max_tokens: null" in (path / "config.yaml").read_text()))
    refused = train(*sweep, cwd=tmp_path)
    assert refused.returncode == 2 and "has no checkpoints, as after scripts/archive.py" in refused.stderr


def test_names_of_runs_do_not_depend_on_where_they_are(tmp_path, monkeypatch):
    """So archives of forked runs can be restored anywhere."""
    monkeypatch.chdir(tmp_path)
    arm = LAB.runs[5]
    paths = {}
    for folder in ("runs", tmp_path / "elsewhere"):
        base = ("experiment=continued", f"paths.runs='{folder}'")
        runs = {arm: ((*base, *arm.overrides), ((*base, *arm.fork.overrides), arm.fork.times))}
        ((paths[folder], _),) = resolve_runs(runs, [0]).values()
        assert find_declared([arm], base, [0]).warnings == ["there is no run of seed 0"]
    elsewhere = paths[tmp_path / "elsewhere"]
    assert paths["runs"].name == elsewhere.name and elsewhere.parent == tmp_path / "elsewhere" / "continued"
