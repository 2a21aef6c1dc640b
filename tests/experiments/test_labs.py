"""Labs: their declarations, the spikes that they count, how arms are compared, and the report of their runs."""

import csv
import math
import re
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.labs.declaration import LABS
from experiments.labs.natural_spikes import natural_spikes, warning_steps
from experiments.labs.rate_report import rate_report, rates_text
from experiments.labs.rule_figure import second_moment_norm
from experiments.labs.spike_numbers import excess, spike_numbers
from experiments.labs.spike_report import findings
from experiments.labs.spike_tables import arm_results
from experiments.labs.statistics import (
    CURES,
    EQUIVALENT,
    HARMS,
    HELPS,
    LOWERS,
    RAISES,
    UNDECIDED,
    decide,
    holm,
    paired_difference,
    paired_ratio,
)
from experiments.run.collect import RunCollection
from experiments.run.read import Run
from experiments.suites import SUITES
from tests.experiments.written_runs import composed, write_lab_run
from tests.helpers import CHECKOUT, script


@pytest.mark.parametrize("name", [name for name in LABS if name != "continued"])
def test_arms_of_a_lab_are_runs_that_can_be_made(name):
    lab = LABS[name]
    labels = [arm.label for arm in lab.arms]
    assert len({*labels}) == len(labels) and lab.reference in labels
    controls = {arm.label for arm in lab.arms if arm.is_control}
    assert controls and lab.reference not in controls and {*getattr(lab, "cures", controls)} <= controls
    assert len({run.overrides for run in lab.runs}) == len(lab.runs), "each is another run"
    assert (CHECKOUT / "configs" / "experiment" / f"{name}.yaml").is_file()
    assert SUITES[f"{name}_lab"].runs == [run.overrides for run in lab.runs]
    strategies = {override for arm in lab.arms for override in arm.overrides if override.startswith("clip=")}
    assert {"clip=none", "clip=fixed", "clip=zclip"} <= strategies
    assert composed(f"experiment={name}", *lab.runs[-1].overrides).experiment == name.replace("_", "-")


def outcomes(comparisons):
    """Return the outcome of each comparison, by label."""
    return {label: comparison.outcome for label, comparison in decide(comparisons).items()}


def falling(steps=2000, level=0.05, noise=0.02, seed=0):
    """Return a loss that falls to a level with a little noise."""
    rng = np.random.default_rng(seed)
    return (4 * np.exp(-np.arange(steps) / 60) + level) * np.exp(rng.normal(0, noise, steps))


def test_a_calm_loss_has_no_spikes():
    assert natural_spikes(falling()) == []


def test_a_spike_has_its_start_length_height_and_area():
    loss = falling(noise=0.0)
    loss[1000:1050] = 1.05
    (spike,) = natural_spikes(loss)
    assert (spike.start, spike.length) == (1000, 50)
    assert spike.level == pytest.approx(0.05, rel=1e-3) and spike.height == pytest.approx(21, rel=1e-3)
    assert spike.area == pytest.approx(50, rel=1e-3)


def test_the_level_of_a_long_spike_is_that_before_it():
    loss = falling()
    loss[1000:1500] = 2.0
    assert [(spike.start, spike.length) for spike in natural_spikes(loss)] == [(1000, 500)]


def test_a_run_that_diverges_has_one_spike_to_its_end():
    loss = falling()
    loss[1200:] = np.nan
    (spike,) = natural_spikes(loss)
    assert (spike.start, spike.length) == (1200, 800)
    assert spike.area == spike.height == math.inf


@settings(max_examples=20)
@given(st.integers(300, 1200), st.integers(1, 400), st.floats(3, 100))
def test_a_jump_is_found_where_it_is(start, length, height):
    loss = np.full(1600, 0.1)
    loss[start : start + length] *= height
    (spike,) = natural_spikes(loss)
    assert (spike.start, spike.length, spike.height) == (start, length, pytest.approx(height))


def test_a_signal_warns_as_many_steps_before_as_it_rises_for():
    signal = np.exp(np.random.default_rng(0).normal(0, 0.1, 1500))
    signal[980:1001] = 10.0
    assert warning_steps(signal, 1000) == 20
    signal[985:988] = 1.0
    assert warning_steps(signal, 1000) == 20, "three steps below the limit do not end a warning"
    signal[985:990] = 1.0
    assert warning_steps(signal, 1000) == 10
    assert warning_steps(np.ones(1500), 1000) == 0
    assert warning_steps(signal, 400) is None, "too few calm steps"


def by_seed(*values):
    return dict(enumerate(values))


def test_ratios_are_those_of_the_same_seed():
    ratio = paired_ratio(by_seed(10, 20, 40), by_seed(100, 200, 400), offset=0)
    assert ratio.mean == pytest.approx(0.1) and ratio.low == pytest.approx(0.1) == ratio.high
    assert paired_ratio(by_seed(1, 2), by_seed(1, 2), offset=1) is None
    unpaired = paired_ratio({0: 1.0, 1: 1.0, 2: 1.0, 7: 1e9}, by_seed(1, 1, 1), offset=1)
    assert unpaired.mean == 1 and unpaired.seeds == 3


def test_arms_of_which_all_runs_diverge_are_the_same():
    everywhere = by_seed(math.inf, math.inf, math.inf)
    assert paired_ratio(everywhere, everywhere, offset=1).mean == 1


def test_an_arm_that_diverges_harms():
    ratio = paired_ratio(by_seed(math.inf, math.inf, math.inf), by_seed(100, 120, 90), offset=1)
    assert ratio.mean > 100 and outcomes({"a": ratio}) == {"a": HARMS}


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ((2, 3, 2, 1, 3), CURES),
        ((20, 22, 25, 19, 24), HELPS),
        ((95, 105, 99, 101, 100), EQUIVALENT),
        ((400, 390, 420, 405, 399), HARMS),
        ((5, 300, 40, 100, 700), UNDECIDED),
    ],
)
def test_outcomes_follow_the_size_of_the_effect(values, outcome):
    ratio = paired_ratio(by_seed(*values), by_seed(100, 102, 99, 101, 98), offset=1)
    assert outcomes({"arm": ratio}) == {"arm": outcome}


def test_a_level_of_zero_has_spikes():
    loss = np.r_[falling(500), np.zeros(500)]
    loss[800:810] = 2.0
    (spike,) = natural_spikes(loss)
    assert (spike.start, spike.length, spike.height, spike.area) == (800, 10, math.inf, 20)


def test_a_diverged_arm_harms_where_the_reference_has_no_spikes():
    ratio = paired_ratio(by_seed(math.inf, math.inf, math.inf), by_seed(0, 0, 0), offset=1)
    assert outcomes({"arm": ratio}) == {"arm": HARMS}


def spike_findings(**losses):
    """Return the findings of arms of the Adam-lag lab, by a function of the seed for each."""
    lab = LABS["adam_lag"]
    runs = {}
    for label, loss_of in losses.items():
        for seed in (0, 1, 2):
            metrics = {"loss": loss_of(seed), "clipped": np.zeros(len(loss_of(seed)))}
            run = Run(Path("run"), {}, metrics, {"steps": len(metrics["loss"])}, [], [], [])
            runs[lab.arm(label.replace("_", " ")), seed] = run
    return findings(lab, arm_results(lab, RunCollection(runs, set(), {}, [], frozenset())))


def spiking(seed):
    loss = falling(1000, seed=seed)
    loss[700:800] = 2.0
    return loss


def test_report_of_an_arm_that_does_not_learn_says_so():
    text = " ".join(spike_findings(no_clipping=spiking, AGC=lambda seed: np.full(1000, 6.0)))
    assert "Less than a tenth of it is left with: AGC" in text
    assert "AGC learns less all the same: its mean loss is 6, and 0.304 with no clipping." in text
    assert "learns less" not in " ".join(spike_findings(no_clipping=spiking, AGC=lambda seed: falling(1000, seed=seed)))


@pytest.mark.parametrize("steps", [150, 1000])
def test_report_of_runs_without_spikes_judges_no_arm(steps):
    arms = {"AGC": lambda seed: np.r_[falling(900), np.full(100, np.nan)]} if steps == 1000 else {}
    same = partial(falling, steps)
    said = spike_findings(no_clipping=lambda seed: same(seed=seed), ZClip=lambda seed: same(seed=seed), **arms)
    assert said[1] == "There is nothing to prevent: these runs do not show the instability."
    assert [sentence.split(":")[0] for sentence in said[2:]] == ["There is more than twice as much with"] * len(arms)


def test_usable_rates_with_a_gap_are_two_ranges():
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    assert rates_text(rates, [1e-3, 3e-3, 3e-2]) == "0.001 to 0.003, 0.03"
    assert rates_text(rates, rates) == "0.001 to 0.03" and rates_text(rates, []) == "none"


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ((0.2, 0.25, 0.22), LOWERS),
        ((0.49, 0.52, 0.5), EQUIVALENT),
        ((0.9, 0.8, 0.86), RAISES),
        ((0.1, 0.9, 0.5), UNDECIDED),
    ],
)
def test_differences_count_from_a_tenth_of_a_nat(values, outcome):
    change = paired_difference(by_seed(*values), by_seed(0.5, 0.5, 0.5))
    assert change.mean == pytest.approx(np.mean(values) - 0.5) and change.low < change.mean < change.high
    assert outcomes({"arm": change}) == {"arm": outcome}


def test_many_arms_need_more_evidence():
    marginal = paired_ratio(by_seed(30, 40, 22), by_seed(100, 100, 100), offset=1)
    assert marginal.p[HELPS] < 0.05
    assert outcomes({"arm": marginal}) == {"arm": HELPS}
    assert outcomes({f"arm {i}": marginal for i in range(10)})["arm 0"] == UNDECIDED


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_p_values_and_bonferroni(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= min(1, len(p_values) * p) + 1e-12 or c >= p for p, c in zip(p_values, corrected, strict=True))
    assert corrected[int(np.argmin(p_values))] == min(1.0, len(p_values) * min(p_values))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


@pytest.fixture(scope="module")
def lab_report(tmp_path_factory):
    """Write runs of some arms of the Adam-lag lab, and make its report."""
    folder = tmp_path_factory.mktemp("lab")
    lab = LABS["adam_lag"]
    spikes = {"no clipping": (900, 1500), "lagged z-score": (1200,), "beta2 0.95": (), "eps 1e-3": (), "brake": ()}
    for label, starts in spikes.items():
        for seed in (0, 1, 2):
            loss = falling(seed=seed)
            norm = falling(seed=seed + 10)
            for start in starts:
                loss[start + seed : start + seed + 100] = 2.0
                norm[start + seed - 12 : start + seed + 100] = 5.0
            write_lab_run(folder / "runs", lab, lab.arm(label), seed, loss, norm)
    done = script("make_lab.py", "lab=adam_lag", "runs=runs", "out=out", "seeds=[0,1,2,3,4]", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.slow
def test_report_says_what_each_arm_does(lab_report):
    text = (lab_report / "report.md").read_text()
    assert "beta2 0.95 must cure if the explanation holds, and does, which does not contradict it." in text
    assert re.search(r"They were made on .+ with torch \d.* \(\d+\), at the commits [0-9a-f]{8} \(\d+\)\.", text)
    assert "The excess is the loss minus its level" in text
    assert "| gradient norm | 12 | 12 to 12 | 3 of 3 |" in text, "a spike too soon after another is left out"
    assert "not run: lagged z-score (seeds 3, 4)" not in text, "seeds of which there is no run are named once"
    assert (
        "there is no run of seeds 3, 4" in text and "not run: fixed 1.0 (seeds 0, 1, 2), ZClip (seeds 0, 1, 2)" in text
    )
    for name in ("areas", "losses", "spike", "rule"):
        assert f"({name}.png)" in text and (lab_report / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_numbers_of_each_run_are_saved(lab_report):
    with (lab_report / "numbers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    first = rows[0]
    assert (first["arm"], first["seed"], first["spike_steps"]) == ("no clipping", "0", "901 1501")
    assert float(first["area"]) == pytest.approx(200 * 1.95, rel=0.05) and float(first["steps_lost"]) == 200


def test_norm_of_the_second_moment_is_that_of_the_optimizer():
    """Torch's Adam keeps it; a step that is not finite is skipped."""
    generator, norms, expected = torch.Generator().manual_seed(0), [], []
    parameter = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], betas=(0.9, 0.95))
    for step in range(60):
        parameter.grad = torch.randn(7, dtype=torch.float64, generator=generator) * 0.9**step
        if step != 20:
            adam.step()
        norms.append(math.nan if step == 20 else float(parameter.grad.norm()))
        state = adam.state[parameter]
        expected.append(float((state["exp_avg_sq"].sum() / (1 - 0.95 ** float(state["step"]))).sqrt()))
    run = Run(Path("run"), {"optim": {"betas": [0.9, 0.95]}}, {"clipped_norm": np.array(norms)}, {}, [], [], [])
    assert second_moment_norm(run) == pytest.approx(expected)


def test_slowed_steps_and_their_mean_scale_are_those_of_the_rule():
    metrics = {"loss": np.ones(300), "clipped": np.zeros(300), "update_scale": np.r_[np.ones(100), np.full(200, 0.5)]}
    run = Run(Path("run"), {}, metrics, {}, [], [], [])
    numbers = spike_numbers(run)
    assert numbers.slowed == pytest.approx(2 / 3) and numbers.scale == 0.5
    run.metrics["update_scale"] = np.full(300, 0.995)
    assert (spike_numbers(run).slowed, spike_numbers(run).scale) == (0, 1)
    del run.metrics["update_scale"]
    assert math.isnan(spike_numbers(run).slowed) and math.isnan(spike_numbers(run).scale)


def test_excess_counts_what_is_too_low_for_a_spike():
    loss = np.ones(1000)
    loss[100], loss[600:603], loss[700] = 9.0, (1.4, 1.2, 1.5), 3.0
    assert excess(loss) == pytest.approx(0.4 + 0.5 + 2.0)  # not step 100, which is in the first 200, and not 1.2
    assert [spike.start for spike in natural_spikes(loss)] == [700]


def test_excess_is_above_the_median_of_the_500_steps_before():
    loss = np.r_[np.full(1000, 4.0), np.ones(400)]  # a fall is no excess, and the level follows after 250 steps
    loss[1100], loss[1300] = 5.0, 5.0
    assert excess(loss) == pytest.approx(0 + 4.0)


@pytest.mark.parametrize("steps", [0, 150, 200])
def test_excess_of_a_short_run_is_zero(steps):
    assert excess(np.ones(steps)) == 0


def test_excess_of_a_loss_that_is_not_finite_is_infinite():
    loss = np.ones(400)
    loss[300] = math.inf
    assert excess(loss) == math.inf


def test_run_that_has_diverged_has_an_infinite_area():
    """Its loss creeps, or jumps in the first steps, so that no spike is found."""
    lab, creeping = LABS["adam_lag"], np.linspace(0.05, 6, 4000)
    metrics = {"loss": creeping, "clipped": np.zeros(4000)}
    runs = {(lab.arm("ZClip"), seed): Run(Path("run"), {}, metrics, {"steps": 4000}, [], [], []) for seed in range(3)}
    assert not natural_spikes(creeping)
    (result,) = arm_results(lab, RunCollection(runs, {*runs}, {}, [], frozenset()))
    assert [each.area for each in result.numbers.values()] == [math.inf] * 3
    (result,) = arm_results(lab, RunCollection(runs, set(), {}, [], frozenset()))
    assert [each.area for each in result.numbers.values()] == [0] * 3


def rate_run(untrained, final):
    metrics = {"step": np.arange(1.0, 3), "loss": np.array([untrained, final])}
    return Run(Path("run"), {}, metrics, {"steps": 2, "test_loss": final if math.isfinite(final) else None}, [], [], [])


def test_report_of_rates_has_the_sensitivity_of_each_arm_with_its_interval():
    lab = LABS["rate"]
    none, zclip = (next(arm for arm in lab.arms if arm.label == label) for label in ("no clipping", "ZClip"))
    finals = {none: (3, 2, 2, 3, 4, math.inf, 9), zclip: (3, 2, 2, 2, 2, 3, 6)}
    runs = {
        (lab.at(arm, rate), seed): rate_run(6.0, final + 0.001 * seed)
        for arm, losses in finals.items()
        for rate, final in zip(lab.rates, losses, strict=True)
        for seed in range(3)
    }
    written = rate_report(lab, RunCollection(runs, set(), {}, [], frozenset()), "Read today.")
    sensitivity = (1 + 0 + 0 + 1 + 2 + 4 + 4) / 7  # losses count at most as much as that of the untrained model
    assert f"With no clipping, the learning-rate sensitivity is {sensitivity:.2f} ± 0.00 nats." in written.text
    assert "Lower by more than 0.1 nats with: ZClip -0.86" in written.text
    assert "| ZClip | 0.001 | 2.001 | 0.001 to 0.03 |" in written.text
    loss = (3 + 2 + 2 + 2 + 2 + 3 + 6 - 3 - 2 - 2 - 3 - 4 - 6 - 6) / 7  # but for a thousandth of a nat
    assert f"The mean loss over the rates is lower by more than 0.1 nats with: ZClip {loss:.2g} (" in written.text
    (row,) = (line.split(" | ") for line in written.text.splitlines() if line.startswith("| no clipping"))
    half = 4.303 * 0.001 / math.sqrt(3)  # of the interval of t over three seeds, for a step of 0.001 from seed to seed
    assert row[4] == f"{sensitivity:.3f} ± {2 / 7 * half:.3f}", "two losses do not depend on the seed"
    assert row[7] == f"{(3 + 2 + 2 + 3 + 4 + 6 + 6) / 7 + 5 / 7 * 0.001:.3f} ± {5 / 7 * half:.3f}"
    assert "not run: fixed 1.0 at 0.0003 (seeds 0, 1, 2)" in written.text
    assert len(list(csv.DictReader(written.numbers.splitlines()))) == len(runs)
    (ax,) = written.figures["rates"].axes
    assert [line.get_label().split(",")[0] for line in ax.lines] == ["no clipping", "ZClip"]
    plt.close(written.figures["rates"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lab=adam",), "lab=adam is not allowed: it must be one of adam_lag, adam_lag_wide"),
        (("lab=adam_lag", "runs=none"), "has no finished run of lab=adam_lag: nothing is written"),
        (
            ("lab=adam_lag", "runs=.", "seeds=[7]", "overrides=[data.max_tokens=8000]"),
            "has no finished run of lab=adam_lag",
        ),
        (
            ("lab=adam_lag", "overrides=[seven]"),
            """overrides=['seven'] is not allowed: it must be a list of settings in""",
        ),
        (("lab=adam_lag", "seeds=[]"), "seeds=[] is not allowed: it must be a list of integers from 0, as [0,1,2]"),
    ],
)
def test_bad_settings_are_named(arguments, message, tmp_path):
    done = script("make_lab.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not [*Path(tmp_path).iterdir()]
