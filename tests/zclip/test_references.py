"""What a rule compares a norm with: averages that lock in, and references that follow or lag behind."""

import math
import random

import pytest
import torch

import zclip.base
import zclip.norm
import zclip.state
import zclip.stateful
from tests.zclip.every_strategy import CLASSES, OF_NORMS, SHORT
from zclip import AdaGC, GlobalAdaGC, LaggedZScore, LogZScore, ZClip


def test_every_public_strategy_is_among_those_of_the_tests():
    assert {type(make()) for make in SHORT.values()} == {*CLASSES}


def norms_after_a_dip(steps: int) -> list[float]:
    """Norms of 1 with a noise of 10 %, among which one of the first hundred is a tenth."""
    draw = random.Random(0)
    norms = [math.exp(draw.gauss(0, 0.1)) for _ in range(steps)]
    norms[50] = 0.1
    return norms


@pytest.mark.parametrize("strategy", [AdaGC, GlobalAdaGC])
def test_adagc_is_locked_in_by_a_dip_in_its_warmup_unless_it_recovers(strategy):
    shares = {}
    for window in (None, 40):
        clip = strategy(recovery_window=window)
        coefficients = [float(clip.observe(torch.tensor(x, dtype=torch.float64))) for x in norms_after_a_dip(1000)]
        shares[window] = sum(c < 1 for c in coefficients[300:]) / 700
    assert shares[None] == 1.0, "the average of the paper's rule starts from the dip"
    assert shares[40] < 0.6


@pytest.mark.parametrize("factor", [0.001, 0.3, 3.0, 1000.0])
def test_log_z_score_follows_a_lasting_change_within_fifty_steps(factor):
    draw = random.Random(1)
    norms = [math.exp(draw.gauss(0, 0.1)) * (1 if t < 200 else factor) for t in range(400)]
    clip = LogZScore()
    coefficients = [float(clip.observe(torch.tensor(x, dtype=torch.float64))) for x in norms]
    assert all(c == 1.0 for c in coefficients[250:])
    assert (coefficients[200] < 0.9) == (factor > 1)


def test_lagged_z_score_clips_a_slow_run_up_that_recent_statistics_follow():
    """Norms that rise by 3 % in each of 40 steps: the mean and deviation of the latest norms rise with them."""
    draw = random.Random(2)
    norms = [math.exp(draw.gauss(0, 0.05)) for _ in range(600)]
    norms += [math.exp(draw.gauss(0, 0.05)) * 1.03**t for t in range(40)]
    lagged, recent = LaggedZScore(lag=200, window=200), LaggedZScore(lag=0, window=40)
    first = {}
    for name, clip in (("lagged", lagged), ("recent", recent)):
        coefficients = [float(clip.observe(torch.tensor(x, dtype=torch.float64))) for x in norms]
        first[name] = [t for t, c in enumerate(coefficients) if c < 1 and t >= 600]
    assert len(first["lagged"]) > 25 > 2 * len(first["recent"])


@pytest.mark.parametrize(
    ("clip", "rise", "least", "most"),
    [(LaggedZScore(), 0.0005, 0.6, 0.8), (LaggedZScore(), 0.001, 0.95, 1.0), (ZClip(), 0.001, 0.005, 0.05)],
)
def test_lagged_z_score_clips_most_steps_while_norms_rise_slowly(clip, rise, least, most):
    """With noise of 10 %. By 0.1 % a step they double in 700 steps."""
    draw = random.Random(0)
    spikes = []
    for step in range(1600):
        clip.observe(torch.tensor((1 + rise) ** step * draw.gauss(1, 0.1), dtype=torch.float64))
        spikes.append(bool(clip.telemetry["spike"]))
        assert spikes[-1] == bool(clip.telemetry["clipped"])
    assert least < sum(spikes[1200:]) / 400 <= most


def test_lagged_z_score_does_not_clip_while_the_norms_it_compares_with_are_zero():
    clip = LaggedZScore(lag=4, window=8, warmup_steps=4)
    coefficients = [float(clip.observe(torch.tensor(x))) for x in [0.0] * 20 + [1.0] * 20 + [5.0]]
    assert coefficients[:-1] == [1.0] * 40 and coefficients[-1] < 0.3


#: Traces that a rule over floats of half the length may not survive.
HARD = {
    "constant": [0.01] * 40,
    "large": [1e18 * 1.01**t for t in range(40)],
    "small": [1e-18 * 1.01**t for t in range(40)],
    "far apart": [10.0 ** (18 * math.sin(t)) for t in range(40)],
    "zero": [0.0] * 10 + [1.0, 0.0] * 10,
}


@pytest.mark.parametrize("norms", HARD.values(), ids=HARD)
@pytest.mark.parametrize("make", OF_NORMS.values(), ids=OF_NORMS)
def test_statistics_in_float32_stay_numbers_and_load_again(make, norms, monkeypatch):
    """As on devices that have no float64."""
    for module in (zclip.base, zclip.norm, zclip.state, zclip.stateful):
        monkeypatch.setattr(module, "statistics_dtype", lambda device: torch.float32)
    strategy = make()
    for norm in norms:
        assert 0 <= float(strategy.observe(torch.tensor(norm))) < math.inf
    assert all(value.dtype != torch.float64 for value in strategy.state.values())
    make().load_state_dict(strategy.state_dict())
