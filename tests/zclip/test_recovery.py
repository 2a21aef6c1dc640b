"""ZClip recovers from level changes, and decides as published where there are none."""

from functools import cache

import numpy as np
import pytest
import torch

from zclip import ZClip

VARIANTS = {
    "reciprocal": {},
    "mean": {"clip_option": "mean"},
    "max": {"clip_option": "max"},
    "percentile": {"mode": "percentile"},
}


def spikes(trace: np.ndarray, **settings) -> np.ndarray:
    """Return whether each step is a spike."""
    zclip = ZClip(**settings)
    flags = []
    for norm in torch.from_numpy(trace):
        zclip.observe(norm)
        flags.append(bool(zclip.telemetry["spike"]))
    return np.array(flags)


def level_change(seed: int, factor: float, change: int, steps: int) -> np.ndarray:
    noise = 1 + 0.05 * np.random.default_rng(seed).standard_normal(steps)
    return noise * np.where(np.arange(steps) < change, 1.0, factor)


@cache
def baseline_rate(variant: str) -> float:
    """Fraction of spikes in the same noise without a level change."""
    rates = []
    for seed in range(10):
        change = 250 + 13 * seed
        rates.append(spikes(level_change(seed, 1.0, 0, change + 400), **VARIANTS[variant])[change + 200 :].mean())
    return float(np.mean(rates))


@pytest.mark.parametrize("change", [0, 1, 2, 3, 4, 5, 13, 20, 37, 38, 39, "in warm-up"])
@pytest.mark.parametrize("factor", [10, 0.1, 0.3])
def test_level_change_is_detected_anywhere_in_a_block(change, factor):
    """Blocks of 40 begin after the warm-up of 25."""
    steps, rates = 15 if change == "in warm-up" else 25 + 240 + change, []
    for seed in range(10):
        rates.append(spikes(level_change(seed, factor, steps, steps + 400))[steps + 200 :].mean())
    assert np.mean(rates) == pytest.approx(baseline_rate("reciprocal"), abs=0.007) and np.mean(rates) > 0.003


@pytest.mark.parametrize("start", range(500, 540, 7))
def test_short_dip_does_not_reset_the_statistics(start):
    trace = level_change(0, 1.0, 0, 700)
    trace[start : start + 45] *= 0.3
    assert np.array_equal(spikes(trace), spikes(trace, recovery_window=None))


@pytest.mark.parametrize("low", [0.45, 0.3])
def test_alternating_level_is_clipped_no_more_than_published(low):
    for period in (100, 160, 240, 400):
        wave = np.where(np.arange(2000) // (period // 2) % 2, low, 1.0) * level_change(1, 1.0, 0, 2000)
        assert spikes(wave).mean() <= spikes(wave, recovery_window=None).mean() + 0.1


def test_recovery_from_an_outlier_in_the_warmup():
    trace = level_change(0, 1.0, 0, 400)
    trace[7] *= 1000
    trace[200::50] *= 3
    assert spikes(trace)[200::50].all()


@pytest.mark.parametrize("factor", [1.2, 1.5, 3, 10, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_normal_clip_rate_returns_within_200_steps(variant, factor):
    before, after = [], []
    for seed in range(10):
        change = 250 + 13 * seed
        trace = level_change(seed, factor, change, change + 400)
        is_spike = spikes(trace, **VARIANTS[variant])
        before.append(is_spike[100:change].mean())
        after.append(is_spike[change + 200 :].mean())
    assert np.mean(after) == pytest.approx(baseline_rate(variant), abs=0.005)
    assert 0.003 < np.mean(after) < 0.04 and 0.003 < np.mean(before) < 0.04


def test_published_rule_stays_locked_in():
    assert spikes(level_change(0, 3.0, 250, 600), recovery_window=None)[260:].all()


@pytest.mark.parametrize("z_thresh", [1.5, 2.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decisions_are_the_published_ones_without_a_lasting_change(variant, z_thresh):
    draw = np.random.default_rng(1)
    trace = np.exp(0.1 * draw.standard_normal(4000) - 0.0005 * np.arange(4000))
    trace[draw.random(4000) < 0.02] *= 8
    trace[1000:1015] *= 5  # fifteen consecutive spikes are not a lasting change
    settings = {**VARIANTS[variant], "z_thresh": z_thresh}
    ours, published = ZClip(**settings), ZClip(**settings, recovery_window=None)
    for norm in torch.from_numpy(trace):
        assert torch.equal(ours.observe(norm), published.observe(norm))
        assert torch.equal(ours.state["mean"], published.state["mean"])
        assert torch.equal(ours.state["var"], published.state["var"])


@pytest.mark.parametrize("level", [1e-6, 1.0, 1e6])
def test_constant_warmup_does_not_make_noise_a_spike(level):
    zclip = ZClip()
    for t in range(200):
        wobble = 0.0 if t < 25 else 1e-5 * (-1) ** t
        coefficient = zclip.observe(torch.tensor(level * (1 + wobble), dtype=torch.float64))
        assert float(coefficient) == 1
    if level > zclip.eps:
        assert float(zclip.observe(torch.tensor(2 * level, dtype=torch.float64))) < 1


def test_warmup_of_zeros_does_not_clip_the_next_norm():
    zclip = ZClip()
    for _ in range(30):
        assert float(zclip.observe(torch.tensor(0.0))) == 1
    assert float(zclip.observe(torch.tensor(3.0))) == 1
