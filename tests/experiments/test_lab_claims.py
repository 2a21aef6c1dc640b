"""Claims that the labs' runs test, with runs that support each and runs that do not."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments.claims.labs import LAB_CLAIMS, leads
from experiments.claims.verdict import CONTRADICTED, NO_EFFECT, NOT_TESTABLE, SUPPORTED, UNDECIDED, judge, judge_claim
from experiments.labs.declaration import ADAM_LAG, LABS, RATE
from experiments.labs.spike_numbers import warnings_of
from experiments.run.archive import restore_archive
from experiments.run.collect import RunCollection
from experiments.run.read import Run, read_run
from experiments.suites import SUITES
from tests.helpers import CHECKOUT

(NORM, UPDATE, UPDATE_NORM, Z, ZCLIP_CURES, FIXED_CURES, FIXED_FAILS) = LAB_CLAIMS["adam_lag"]
QK_NORM, NOTHING = LAB_CLAIMS["rate"]
#: Steps of the spikes of a run.
SPIKES = (1000, 2000)
FIVE = range(5)


def run_of(seed, lead=None, areas=(50.0,), **columns):
    """Return a run with a spike of each area, before which each signal rises by so many steps plus the seed."""
    rng = np.random.default_rng(seed)
    loss = 0.05 * np.exp(rng.normal(0, 0.02, 2600))
    metrics = {name: np.exp(rng.normal(0, 0.1, 2600)) for name in (lead or {})}
    for start, area in zip(SPIKES, areas, strict=False):
        loss[start : start + 50] += area / 50
        for name, steps in (lead or {}).items():
            metrics[name][start - steps - seed : start + 50] = 20.0
    metrics |= {"loss": loss, **columns}
    if "z" in metrics:
        metrics["z"] = np.log(metrics["z"])
    return Run(Path(f"run-{seed}"), {}, metrics, {"parameters": 1000, "tokens": 2_000_000}, [], [], [])


def collection(arms, seeds=FIVE):
    """Return the runs of some arms of the Adam-lag lab, each by a function of the seed."""
    runs = {(ADAM_LAG.arm(label), seed): make(seed) for label, make in arms.items() for seed in seeds}
    return RunCollection(runs, set(), {}, [], frozenset())


def test_runs_that_have_diverged_count_against_their_strategy():
    runs = collection({"no clipping": run_of, "ZClip": lambda seed: run_of(seed, areas=())})
    assert judge_claim(ZCLIP_CURES, runs).outcome == SUPPORTED
    diverged = {(ADAM_LAG.arm("ZClip"), seed) for seed in FIVE}
    verdict = judge_claim(ZCLIP_CURES, runs._replace(diverged=diverged))
    assert verdict.outcome == CONTRADICTED and verdict.part.number.value > 0


@pytest.mark.parametrize("name", LAB_CLAIMS)
def test_claims_name_runs_of_their_lab(name):
    for claim in LAB_CLAIMS[name]:
        assert claim.experiments == (f"{name}_lab",)
        assert {run.overrides for _, run in claim.specs} <= {*SUITES[f"{name}_lab"].runs}
        assert {run for _, run in claim.specs} <= {*LABS[name].runs} and claim.specs


def test_claims_without_runs_are_not_testable():
    for claims in LAB_CLAIMS.values():
        for verdict in judge(claims, RunCollection({}, set(), {}, [], frozenset())):
            assert verdict.outcome == NOT_TESTABLE and verdict.evidence[-1] == "none of its runs has begun"


def test_norms_that_rise_before_the_loss_warn():
    runs = collection({"no clipping": lambda seed: run_of(seed, {"grad_norm": 10, "update_norm": 30}, (50, 50))})
    verdict = judge_claim(NORM, runs)
    assert verdict.outcome == SUPPORTED and verdict.scale == "1k parameters, 2M tokens, seeds 0, 1, 2, 3, 4"
    # Both spikes of seed s have s more steps: the mean is 12.
    assert verdict.part.number.value == 12 and "seed 0: 10, 10; seed 1: 11, 11" in verdict.evidence[1]
    assert judge_claim(UPDATE, runs).part.number.value == 32
    assert judge_claim(UPDATE_NORM, runs).part.number.value == 20
    late = collection({"no clipping": lambda seed: run_of(seed, {"grad_norm": 30, "update_norm": 10 - seed})})
    assert judge_claim(UPDATE_NORM, late).outcome == CONTRADICTED
    none = collection({"no clipping": lambda seed: run_of(seed, {"grad_norm": 10}, ())})
    assert judge_claim(NORM, none).outcome == NOT_TESTABLE, "there are no spikes"
    assert (
        "a run has no update_norm: run-0" in judge_claim(UPDATE, collection({"no clipping": run_with_norm})).evidence[0]
    )


def test_a_spike_soon_after_another_has_no_calm_steps():
    run = run_of(0, {"grad_norm": 10}, (50, 50))
    again = run_of(0, {"grad_norm": 10}, (50, 50))
    again.metrics["loss"][1400:1450] += 1.0  # 350 steps after the first spike, and 550 before the last one
    signals = (lambda each: each.metrics["grad_norm"], lambda each: each.metrics["loss"])
    assert leads(run, *signals) == [10, 10] and leads(again, *signals) == [10]


def run_with_norm(seed):
    return run_of(seed, {"grad_norm": 10})


def test_z_score_warns_by_the_rule_of_the_other_signals():
    runs = collection({"ZClip": lambda seed: run_of(seed, {"grad_norm": 5 + seed % 2, "z": 40})})
    verdict = judge_claim(Z, runs)
    assert verdict.outcome == SUPPORTED and verdict.part.number.value == pytest.approx(35 - 0.4)
    huge = run_of(0, {"grad_norm": 5, "z": 40})
    huge.metrics["z"][990:1050] = 1e6
    assert leads(huge, lambda run: run.metrics["grad_norm"], lambda run: run.metrics["loss"]) == [5]
    again = collection({"ZClip": lambda seed: huge if not seed else run_of(seed, {"grad_norm": 5 + seed % 2, "z": 40})})
    assert judge_claim(Z, again).outcome == SUPPORTED, "an exponential that is infinite"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> RunCollection:
    """The recorded runs of the Adam-lag lab without clipping."""
    folder, archives = tmp_path_factory.mktemp("recorded"), CHECKOUT / "experiments" / "results" / "runs" / "adam-lag"
    runs = {}
    for archive in sorted(archives.glob("pico-none-monitor-lr0.01-seed*")):
        restore_archive(archive, folder / archive.name)
        run = read_run(folder / archive.name)
        runs[ADAM_LAG.arm("no clipping"), run.config["seed"]] = run
    assert len(runs) >= 3
    return RunCollection(runs, set(), {}, [], frozenset())


def test_warnings_of_recorded_runs_are_those_of_the_lab(recorded):
    """The lab's table has the steps of each signal before the loss, and claims have their differences."""
    for run in recorded.runs.values():
        steps = [each["grad_norm"] - each["loss"] for each in warnings_of(run)]
        assert leads(run, lambda r: r.metrics["grad_norm"], lambda r: r.metrics["loss"]) == steps and steps
    assert judge_claim(NORM, recorded).outcome == judge_claim(UPDATE, recorded).outcome == SUPPORTED


def with_areas(**areas):
    """Return runs of arms whose spikes have so much area with the seed 0, and each further seed 5 % more."""
    return collection(
        {
            label.replace("_", " ").replace("fixed", "fixed 1.0"): lambda seed, area=area: run_of(
                seed, areas=(area * 1.05 ** (seed % 3),) if area else ()
            )
            for label, area in areas.items()
        }
    )


def test_an_arm_cures_if_it_leaves_less_than_a_tenth_of_the_area():
    noisy = collection(
        {
            "no clipping": lambda seed: run_of(seed, areas=(100,)),
            "ZClip": lambda seed: run_of(seed, areas=(10 ** (seed / 2),)),
        }
    )
    for areas, outcome in (
        (with_areas(no_clipping=100, ZClip=0), SUPPORTED),
        (with_areas(no_clipping=100, ZClip=40), CONTRADICTED),
        (with_areas(no_clipping=0, ZClip=0), NOT_TESTABLE),
        (noisy, UNDECIDED),
    ):
        assert judge_claim(ZCLIP_CURES, areas).outcome == outcome
    verdict = judge_claim(ZCLIP_CURES, with_areas(no_clipping=100, ZClip=40))
    # The area of a spike is above its level, of which noise of 2 % makes little; 1 is added to both.
    assert verdict.part.number.value == pytest.approx(math.log(0.41), abs=0.05)
    assert "0.41 of the area of spikes" in verdict.evidence[0]
    assert judge_claim(FIXED_CURES, with_areas(no_clipping=100, fixed=0)).outcome == SUPPORTED
    assert judge_claim(FIXED_CURES, with_areas(fixed=0)).outcome == NOT_TESTABLE


def test_a_run_that_diverges_is_no_cure():
    def diverging(seed):
        run = run_of(seed, areas=())
        run.metrics["loss"][1500 + seed :] = np.nan
        return run

    runs = collection({"no clipping": lambda seed: run_of(seed, areas=(100 + seed,)), "ZClip": diverging})
    assert judge_claim(ZCLIP_CURES, runs).outcome == CONTRADICTED


def test_a_fixed_threshold_fails_if_zclip_leaves_half_of_its_spikes():
    for fixed, zclip, outcome in ((100, 20, SUPPORTED), (20, 100, CONTRADICTED), (100, 95, NO_EFFECT)):
        runs = collection(
            {
                "fixed 1.0": lambda seed, area=fixed: run_of(seed, areas=(area * 1.1 ** (seed % 2),)),
                "ZClip": lambda seed, area=zclip: run_of(seed, areas=(area,)),
            }
        )
        assert judge_claim(FIXED_FAILS, runs).outcome == outcome, (fixed, zclip)


def rates(**losses):
    """Return runs of arms of the rate lab: test losses over its seven rates, with a noise of 0.0005."""
    runs = {}
    for label, of_rates in losses.items():
        arm = next(arm for arm in RATE.arms if arm.label == label.replace("_", " ").replace("fixed", "fixed 1.0"))
        for rate, loss in zip(RATE.rates, of_rates, strict=True):
            for seed in FIVE:
                metrics = {"loss": np.array([9.0, 5.0])}
                noise = np.random.default_rng([seed, len(label), int(1e4 * rate)]).normal(0, 5e-4)
                result = {"test_loss": loss + noise}
                runs[RATE.at(arm, rate), seed] = Run(Path("run"), {}, metrics, result, [], [], [])
    return RunCollection(runs, set(), {}, [], frozenset())


FLAT, STEEP = [4.0] * 7, [4.0] * 4 + [5.0, 6.0, 7.0]


def test_qk_norm_suffices_if_zclip_adds_nothing_to_it():
    """Sensitivities are 0 and 6 / 7; the seeds differ by less than 1e-3."""
    close = [4.0] * 6 + [4.14]
    for alone, both, outcome in ((close, FLAT, SUPPORTED), (STEEP, FLAT, CONTRADICTED), (FLAT, STEEP, SUPPORTED)):
        arms = {"QK-norm": alone, "QK-norm and ZClip": both}
        assert judge_claim(QK_NORM, rates(**arms)).outcome == outcome
    verdict = judge_claim(QK_NORM, rates(**{"QK-norm": STEEP, "QK-norm and ZClip": FLAT, "no_clipping": STEEP}))
    assert verdict.part.number.value == pytest.approx(6 / 7, abs=1e-3)
    assert any(text.startswith("mean sensitivity with no clipping: 0.85") for text in verdict.evidence)
    assert judge_claim(QK_NORM, rates(**{"QK-norm": FLAT})).outcome == NOT_TESTABLE


def test_clipping_does_nothing_if_the_best_losses_are_alike():
    """The best loss of each arm counts, at whatever rate it is."""
    arms = {"no_clipping": STEEP, "fixed": [5.0, *[4.002] * 6], "ZClip": [4.004] * 7}
    verdict = judge_claim(NOTHING, rates(**arms))
    assert verdict.outcome == SUPPORTED and verdict.part.number.value == pytest.approx(0.004, abs=1e-3)
    assert judge_claim(NOTHING, rates(**arms | {"ZClip": [3.95] * 7})).outcome == CONTRADICTED, "it helps"
    assert judge_claim(NOTHING, rates(**arms | {"fixed": [4.05] * 7})).outcome == CONTRADICTED, "it harms"
    del arms["fixed"]
    assert judge_claim(NOTHING, rates(**arms)).outcome == NOT_TESTABLE
