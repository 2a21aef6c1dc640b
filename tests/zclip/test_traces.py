"""Thresholds and statistics against float64 transcriptions of the formulas, over traces with spikes."""

import math

import numpy as np
import pytest
import torch

from tests.zclip.norm_traces import replay_lanes, spiky_norms
from tests.zclip.transcriptions import ZClipEquations
from zclip import AutoClip, FixedNorm, NoClipping, ZClip

TRACES, STEPS = 20, 225


@pytest.fixture(scope="module")
def traces():
    """Twenty traces, two of them with a lasting change of level at step 80, for the recovery rule."""
    traces = np.array([spiky_norms(seed, STEPS) for seed in range(TRACES)])
    traces[0, 80:] *= 5
    traces[1, 80:] *= 0.1
    return traces


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
def test_zclip_follows_its_equations(settings, max_grad_norm, skip, traces):
    """225 steps decide: they hold the warm-up, five blocks of the recovery rule and six time constants of the mean."""
    settings = {**settings, "max_grad_norm": max_grad_norm, "skip_update_on_spike": skip}
    lanes = replay_lanes(ZClip(**settings), traces)
    counts = {"spike": 0.0, "recovered": 0.0}
    for i, trace in enumerate(traces):
        expected = ZClipEquations(**settings)
        rows = []
        for x in trace:
            coefficient = expected.observe(x)
            rows.append({**expected.telemetry, "coefficient": coefficient, "new mean": expected.mean,
                         "new var": expected.var})  # fmt: skip
        columns = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
        np.testing.assert_array_equal(lanes.telemetry["spike"][i], columns["spike"])
        np.testing.assert_array_equal(lanes.telemetry["recovered"][i], columns["recovered"])
        np.testing.assert_array_equal(lanes.telemetry["clipped_by_max"][i], columns["clipped_by_max"])
        np.testing.assert_allclose(lanes.coefficients[i], columns["coefficient"], rtol=1e-9)
        np.testing.assert_allclose(lanes.telemetry["z"][i], columns["z"], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(lanes.telemetry["mean"][i], columns["mean"], rtol=1e-9)
        np.testing.assert_allclose(lanes.telemetry["std"][i], columns["std"], rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(lanes.state["mean"][i], columns["new mean"], rtol=1e-9)
        np.testing.assert_allclose(lanes.state["var"][i], columns["new var"], rtol=1e-7, atol=1e-18)
        for key in counts:
            counts[key] += columns[key].sum()
    assert counts["spike"] > traces.size / 200
    assert (counts["recovered"] > 0) == (settings.get("recovery_window", 40) is not None)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"clip_option": "mean", "recovery_window": None}], ids=str)
def test_no_error_accumulates_over_ten_thousand_steps(settings):
    zclip, expected = ZClip(**settings), ZClipEquations(**settings)
    for x in spiky_norms(seed=1, steps=10_000):
        coefficient = float(zclip.observe(torch.tensor(x, dtype=torch.float64)))
        assert coefficient == pytest.approx(expected.observe(x), rel=1e-9)
        assert float(zclip.state["mean"]) == pytest.approx(expected.mean, rel=1e-9)
        assert float(zclip.state["var"]) == pytest.approx(expected.var, rel=1e-7, abs=1e-18)


def percentile(history: list[float], p: float) -> float:
    ordered = sorted(history)
    rank = (len(ordered) - 1) * p / 100
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


@pytest.mark.parametrize(("p", "window"), [(10, None), (90, None), (50, 64), (0, 7), (100, 16)])
def test_autoclip_follows_its_algorithm(p, window):
    """300 steps fill the largest window four times; `test_autoclip_enlarges_a_full_history` is in test_step.py."""
    clip = AutoClip(percentile=p, window=window)
    history: list[float] = []
    for x in spiky_norms(seed=2, steps=300):
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
