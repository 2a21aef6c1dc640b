"""Thresholds and statistics against float64 transcriptions of the formulas, over 10,000 steps with spikes."""

import math
import statistics

import pytest
import torch

from tests.zclip.norm_traces import spiky_norms
from zclip import AutoClip, FixedNorm, NoClipping, ZClip

STEPS = 10_000


def reference(trace, alpha, z_thresh, option, warmup_steps, eps, max_grad_norm, clip_factor, skip):
    """The paper's formulas in Python floats. Yields (target or None, mean, var) after each step."""
    first: list[float] = []
    mean = var = 0.0
    for x in trace:
        target = None
        if len(first) < warmup_steps:
            first.append(x)
            mean, var = statistics.fmean(first), statistics.pvariance(first)
        else:
            std = math.sqrt(var)
            z = (x - mean) / (std + eps)
            spike = z > z_thresh
            if spike:
                xi = {"adaptive_scaling": z_thresh**2 / z, "mean": 0.0, "max": z_thresh}[option]
                target = mean + xi * std
                if option == "adaptive_scaling":
                    target *= clip_factor
            if not (spike and skip):
                y = target if spike else x
                mean = alpha * mean + (1 - alpha) * y
                var = alpha * var + (1 - alpha) * (y - mean) ** 2
        if max_grad_norm is not None:
            target = max_grad_norm if target is None else min(target, max_grad_norm)
        yield target, mean, var


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.2])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_option": "adaptive_scaling"},
        {"clip_option": "adaptive_scaling", "clip_factor": 0.7, "alpha": 0.9, "recovery_window": None},
        {"clip_option": "mean"},
        {"clip_option": "max"},
        {"mode": "percentile"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_zclip_follows_its_equations(settings, max_grad_norm, skip):
    zclip = ZClip(**settings, max_grad_norm=max_grad_norm, skip_update_on_spike=skip)
    option = "max" if zclip.mode == "percentile" else zclip.clip_option
    trace = spiky_norms(seed=1, steps=STEPS if max_grad_norm is None else 2000)
    expected = reference(
        trace, zclip.alpha, zclip.z_thresh, option, 25, zclip.eps, max_grad_norm, zclip.clip_factor, skip
    )
    spikes = 0
    for x, (target, mean, var) in zip(trace, expected, strict=True):
        coefficient = float(zclip.observe(torch.tensor(x, dtype=torch.float64)))
        expected_coefficient = 1.0 if target is None or x <= target else target / (x + 1e-6)
        assert coefficient == pytest.approx(expected_coefficient, rel=1e-9)
        assert float(zclip.state["mean"]) == pytest.approx(mean, rel=1e-9)
        assert float(zclip.state["var"]) == pytest.approx(var, rel=1e-7, abs=1e-18)
        spikes += float(zclip.telemetry["spike"])
    assert spikes > len(trace) / 200


def percentile(history: list[float], p: float) -> float:
    ordered = sorted(history)
    rank = (len(ordered) - 1) * p / 100
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


@pytest.mark.parametrize(("p", "window"), [(10, None), (90, None), (50, 64), (0, 7), (100, 16)])
def test_autoclip_follows_its_algorithm(p, window):
    clip = AutoClip(percentile=p, window=window)
    history: list[float] = []
    for x in spiky_norms(seed=2, steps=2500):
        history = [*history, x][-(window or 10**9) :]
        target = percentile(history, p)
        coefficient = float(clip.observe(torch.tensor(x, dtype=torch.float64)))
        assert coefficient == pytest.approx(min(1.0, target / (x + 1e-6)) if x > target else 1.0, rel=1e-9)


def test_fixed_norm_and_no_clipping():
    fixed, none = FixedNorm(0.8), NoClipping()
    for x in spiky_norms(seed=3, steps=200):
        x = torch.tensor(x, dtype=torch.float64)
        assert float(fixed.observe(x)) == pytest.approx(min(1.0, 0.8 / (float(x) + 1e-6)) if x > 0.8 else 1.0)
        assert float(none.observe(x)) == 1.0
