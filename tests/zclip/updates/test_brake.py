"""UpdateBrake: what widens its bound and what does not, and the states that it refuses."""

import copy
import math
import random

import pytest
import torch

from tests.zclip.updates.rules import SHORT_BRAKE, growing_norms
from zclip.updates import UpdateBrake, UpdateClip


@pytest.mark.parametrize(("deviation", "sigmas", "expected"), [(0.1, 5, 1), (0.3, 5, 0.98), (0.3, 0, 0.49)])
def test_norms_that_vary_by_themselves_hold_the_scale_of_a_brake_only_without_sigmas(deviation, sigmas, expected):
    """The numbers of docs/reference/strategies.md."""
    rule, draw, scales = UpdateBrake(sigmas=sigmas), random.Random(0), []
    for _ in range(4000):
        norm = math.exp(draw.gauss(0.0, deviation))
        scales.append(float(rule.observe(torch.tensor(norm, dtype=torch.float64))))
    assert sum(scales[2000:]) / 2000 == pytest.approx(expected, abs=0.03)


def few_high(draw: random.Random) -> float:
    """Norms of which 2 % are 2.5 times the usual."""
    return math.exp(draw.gauss(0.0, 0.05)) * (2.5 if draw.random() < 0.02 else 1.0)


def exponential(draw: random.Random) -> float:
    """Norms whose logarithm has an exponential tail of 0.3."""
    return math.exp(draw.expovariate(1 / 0.3))


@pytest.mark.parametrize(("norms", "lowest", "highest"), [(few_high, 0.57, 0.63), (exponential, 0.38, 0.53)])
@pytest.mark.parametrize("seed", range(3))
def test_a_tail_of_high_norms_holds_the_rate_down(norms, lowest, highest, seed):
    """The limit that docs/reference/strategies.md states: what is above the mean does not widen the bound."""
    rule, draw = UpdateBrake(), random.Random(seed)
    scales = [float(rule.observe(torch.tensor(norms(draw), dtype=torch.float64))) for _ in range(5000)]
    assert lowest < sum(scales[1000:]) / 4000 < highest


def test_a_single_high_norm_is_remembered_for_more_than_a_thousand_steps():
    """The other limit that docs/reference/strategies.md states."""
    rule, draw = UpdateBrake(), random.Random(0)
    norms = [math.exp(draw.gauss(0.0, 0.05)) * (20 if step == 1000 else 1) for step in range(2501)]
    scales = [float(rule.observe(torch.tensor(norm, dtype=torch.float64))) for norm in norms]
    assert scales[999] == pytest.approx(1, abs=0.01)
    assert scales[1000] == pytest.approx(0.07, abs=0.01)
    assert scales[2500] == pytest.approx(0.55, abs=0.03)


def test_run_up_does_not_widen_the_bound():
    """The variance counts what is below the mean: norms that grow tenfold leave it as it is."""
    rule, draw = UpdateBrake(), random.Random(1)
    for _ in range(1000):
        rule.observe(torch.tensor(math.exp(draw.gauss(0.0, 0.1)), dtype=torch.float64))
    calm = rule.read_telemetry()["update_bound"]
    for step in range(40):
        rule.observe(torch.tensor(math.exp(step / 17), dtype=torch.float64))
    assert rule.read_telemetry()["update_bound"] == pytest.approx(calm, rel=0.03)
    assert rule.read_telemetry()["update_scale"] < 0.25


def test_norms_that_fall_steadily_do_not_widen_the_bound():
    """After the start of a run norms fall tenfold in 250 steps: the bound is near them from step 200 on."""
    rule, draw = UpdateBrake(), random.Random(2)
    for step in range(600):
        norm = 100 * 0.1 ** (min(step, 250) / 250) * math.exp(draw.gauss(0.0, 0.05))
        rule.observe(torch.tensor(norm, dtype=torch.float64))
        if step >= 200:
            assert 1.3 < rule.read_telemetry()["update_bound"] / norm < 4


@pytest.mark.parametrize(
    ("first", "steps", "highest"), [(500, 1, 2), (500, 10, 3), (500, 50, 4), (25, 3, 5), (70, 10, 5)]
)
def test_few_steps_almost_without_gradients_change_the_bound_little(first, steps, highest):
    """It is that low at once late in a run, and 100 steps later early in one."""
    rule, draw = UpdateBrake(), random.Random(3)
    for step in range(900):
        norm = 1e-6 if first <= step < first + steps else math.exp(draw.gauss(0.0, 0.05))
        rule.observe(torch.tensor(norm, dtype=torch.float64))
        if step >= 200:
            assert 1.1 < rule.read_telemetry()["update_bound"] < highest


def test_norms_that_have_fallen_for_good_are_followed():
    rule, draw = UpdateBrake(), random.Random(4)
    for step in range(2500):
        norm = (1.0 if step < 500 else 0.01) * math.exp(draw.gauss(0.0, 0.05))
        rule.observe(torch.tensor(norm, dtype=torch.float64))
    assert 1.3 < rule.read_telemetry()["update_bound"] / 0.01 < 2


@pytest.mark.parametrize(("factor", "steps"), [(2, 1500), (6, 3100), (50, 4100)])
def test_norms_that_have_risen_for_good_lower_the_rate_for_a_limited_number_of_steps(factor, steps):
    """With 5 % of noise. Without recovery, a rise to 50 times is not followed within these steps."""
    scales, rules = {}, {}
    for window in (500, None):
        rule, draw = UpdateBrake(recovery_window=window), random.Random(5)
        norms = [(1.0 if step < 500 else factor) * math.exp(draw.gauss(0.0, 0.05)) for step in range(500 + steps)]
        scales[window] = [float(rule.observe(torch.tensor(norm, dtype=torch.float64))) for norm in norms]
        rules[window] = rule.read_telemetry()
    assert scales[500][:1000] == scales[None][:1000] and max(scales[500][501:900]) < 1
    assert scales[500][-1] > 0.9 and rules[500]["update_bound"] > factor
    if factor == 50:
        assert scales[None][-1] < 0.3 and rules[None]["update_bound"] < factor


@pytest.mark.parametrize("seed", range(3))
def test_scale_never_returns_faster_than_it_is_released(seed):
    """Also where the statistics are reset: a run at the edge of stability would be unstable at its full rate."""
    rule, draw, scale, resets = UpdateBrake(recovery_window=8), random.Random(seed), 1.0, 0
    for step in range(600):
        norm = 3.0 ** (step // 100) * math.exp(draw.gauss(0.0, 0.05))
        before, scale = scale, float(rule.observe(torch.tensor(norm, dtype=torch.float64)))
        assert scale <= before**rule.release * (1 + 1e-12)
        resets += rule.read_telemetry()["update_recovered"]
    assert resets > 3


@pytest.mark.parametrize("pause", [0, 1])
def test_one_step_below_the_bound_ends_the_row(pause):
    rule, recovered = UpdateBrake(warmup_steps=5, recovery_window=50), []
    for step in range(150):
        norm = 1.0 if step < 50 or (pause and step == 90) else 5.0
        rule.observe(torch.tensor(norm, dtype=torch.float64))
        recovered.append(rule.read_telemetry()["update_recovered"])
    assert [step for step, value in enumerate(recovered) if value] == [140 if pause else 99]


def test_saved_states_that_are_damaged_or_of_other_rules_are_refused():
    rule = UpdateBrake(**SHORT_BRAKE)
    for norm in growing_norms(3, 130):
        rule.observe(torch.tensor(norm, dtype=torch.float64))
    saved = rule.state_dict()
    with pytest.raises(ValueError, match=r"^state of UpdateBrake \(version 1\) cannot be loaded into UpdateClip"):
        UpdateClip().load_state_dict(saved)
    with pytest.raises(ValueError, match=r"was made with .*release=0\.9, not 0\.999"):
        UpdateBrake().load_state_dict(saved)
    for key, value, words in (
        ("log_scale", 0.5, r"state\.log_scale=0\.5 is not allowed: it must be at most 0"),
        ("log_scale", math.nan, r"state\.log_scale"),
        ("count", 0, r"state\.level=.* finite after the first step, and -inf before"),
        ("level", math.nan, r"state\.level"),
        ("mean", math.nan, r"state\.mean=nan is not allowed: it must be a finite number"),
        ("variance", -1.0, r"state\.variance"),
        ("above", -1, r"state\.above"),
    ):
        damaged = copy.deepcopy(saved)
        damaged["state"][key].fill_(value)
        with pytest.raises(ValueError, match=words):
            UpdateBrake(**SHORT_BRAKE).load_state_dict(damaged)


def test_state_from_before_the_recovery_is_taken_up():
    """It has neither the argument nor the number of norms in a row, and goes on as a state that had none in a row."""
    rule, old, draw = UpdateBrake(), UpdateBrake(), random.Random(6)
    for _ in range(200):
        rule.observe(torch.tensor(math.exp(draw.gauss(0.0, 0.1)), dtype=torch.float64))
    saved = copy.deepcopy(rule.state_dict())
    del saved["config"]["recovery_window"], saved["state"]["above"]
    old.load_state_dict(saved)
    norms = [torch.tensor(4.0 if step < 600 else 1.0, dtype=torch.float64) for step in range(700)]
    assert [float(old.observe(norm)) for norm in norms] == [float(rule.observe(norm)) for norm in norms]
    saved["state"].pop("level")
    with pytest.raises(ValueError, match=r"the saved UpdateBrake is damaged: state lacks level"):
        UpdateBrake().load_state_dict(saved)


def test_repr_and_live_changes_are_those_of_strategies():
    rule = UpdateBrake(release=0.99)
    assert repr(rule).startswith("UpdateBrake(margin=1.6, release=0.99, sigmas=5.0, rise_steps=1000")
    rule.observe(torch.tensor(2.0))
    rule.change(release=0.5)
    assert rule.state_dict()["changes"] == [["release", 0.99, 0.5]]
    for arguments in (
        {"release": 1.0},
        {"margin": 1},
        {"margin": math.inf},
        {"margin": 10**400},
        {"sigmas": -1},
        {"rise_steps": 0},
        {"fall_steps": 0.5},
        {"recovery_window": 7},
    ):
        (name,) = arguments
        with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed: it must be "):
            UpdateBrake(**arguments)
