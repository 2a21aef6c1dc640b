"""ZClip recovers from level changes, and decides as published where there are none."""

import numpy as np
import pytest
import torch

from tests.helpers import SLOW
from tests.zclip.norm_traces import Lanes, replay_lanes
from zclip import ZClip

VARIANTS = {
    "reciprocal": {},
    "mean": {"clip_option": "mean"},
    "max": {"clip_option": "max"},
    "percentile": {"mode": "percentile"},
}
SEEDS = range(10)
CHANGES = [0, 1, 2, 3, 4, 5, 13, 20, 37, 38, 39, "in warm-up"]
DIPS = range(500, 540, 7)


def level_change(seed: int, factor: float, change: int, steps: int) -> np.ndarray:
    noise = 1 + 0.05 * np.random.default_rng(seed).standard_normal(steps)
    return noise * np.where(np.arange(steps) < change, 1.0, factor)


def spikes(traces: dict, **settings) -> dict:
    """Return whether each step is a spike, for traces by name; all traces are replayed at once, padded by ones."""
    padded = np.ones((len(traces), max(map(len, traces.values()))))
    for row, trace in zip(padded, traces.values(), strict=True):
        row[: len(trace)] = trace
    flags = replay_lanes(ZClip(**settings), padded).spikes
    return {name: row[: len(trace)] for row, (name, trace) in zip(flags, traces.items(), strict=True)}


def change_step(seed: int) -> int:
    return 250 + 13 * seed


def step_in_block(change: int | str) -> int:
    """Blocks of 40 begin after the warm-up of 25."""
    return 15 if change == "in warm-up" else 25 + 240 + change


def dip(start: int) -> np.ndarray:
    trace = level_change(0, 1.0, 0, 700)
    trace[start : start + 45] *= 0.3
    return trace


def outlier_in_warmup() -> np.ndarray:
    trace = level_change(0, 1.0, 0, 400)
    trace[7] *= 1000
    trace[200::50] *= 3
    return trace


@pytest.fixture(scope="module")
def found() -> dict:
    """Whether each step is a spike, by variant (or "published", without recovery) and name of the trace."""
    traces = {}
    for seed in SEEDS:
        change = change_step(seed)
        traces["baseline", seed] = level_change(seed, 1.0, 0, change + 400)
        for factor in (1.2, 1.5, 3, 10, 0.1):
            traces["change", factor, seed] = level_change(seed, factor, change, change + 400)
    others = {("dip", start): dip(start) for start in DIPS}
    for change in CHANGES:
        for factor in (10, 0.1, 0.3):
            for seed in SEEDS:
                step = step_in_block(change)
                others["block", change, factor, seed] = level_change(seed, factor, step, step + 400)
    others["outlier"] = outlier_in_warmup()
    results = {
        variant: spikes(traces | (others if variant == "reciprocal" else {}), **settings)
        for variant, settings in VARIANTS.items()
    }
    published = {("dip", start): dip(start) for start in DIPS} | {"rise": level_change(0, 3.0, 250, 600)}
    return results | {"published": spikes(published, recovery_window=None)}


def baseline_rate(found: dict, variant: str) -> float:
    """Fraction of spikes in the same noise without a level change."""
    return float(np.mean([found[variant]["baseline", seed][change_step(seed) + 200 :].mean() for seed in SEEDS]))


@pytest.mark.parametrize("settings", [*VARIANTS.values(), {"recovery_window": None}, {"max_grad_norm": 1.1}], ids=str)
def test_replay_of_many_traces_equals_observe(settings):
    """The changes of level make the recovery rule reset the statistics."""
    traces = np.stack([level_change(seed, factor, 60, 130) for seed, factor in enumerate((1.0, 10, 0.1))])
    traces[:, 40::30] *= 2
    lanes = replay_lanes(ZClip(**settings), traces)
    assert bool(lanes.telemetry["recovered"].any()) == ("recovery_window" not in settings)
    for i, trace in enumerate(traces):
        zclip, coefficients, telemetry, states = ZClip(**settings), [], [], []
        for norm in torch.from_numpy(trace):
            coefficients.append(float(zclip.observe(norm)))
            telemetry.append([float(zclip.telemetry[key]) for key in lanes.telemetry])
            states.append([zclip.state[key].numpy().copy() for key in lanes.state])
        np.testing.assert_array_equal(coefficients, lanes.coefficients[i])
        for key, values in zip(lanes.telemetry, zip(*telemetry, strict=True), strict=True):
            np.testing.assert_array_equal(values, lanes.telemetry[key][i], err_msg=key)
        for key, values in zip(lanes.state, zip(*states, strict=True), strict=True):
            np.testing.assert_array_equal(values, lanes.state[key][i], err_msg=key)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("factor", [10, 0.1, 0.3])
def test_level_change_is_detected_anywhere_in_a_block(change, factor, found):
    steps = step_in_block(change)
    rates = [found["reciprocal"]["block", change, factor, seed][steps + 200 :].mean() for seed in SEEDS]
    assert np.mean(rates) == pytest.approx(baseline_rate(found, "reciprocal"), abs=0.007) and np.mean(rates) > 0.003


@pytest.mark.parametrize("start", DIPS)
def test_short_dip_does_not_reset_the_statistics(start, found):
    assert np.array_equal(found["reciprocal"]["dip", start], found["published"]["dip", start])


PERIODS = (100, 160, 240, 400)


@pytest.fixture(scope="module", params=[600, SLOW(2000)])
def alternating(request) -> tuple[dict, dict]:
    """Whether each step is a spike, by low level and period, with and without recovery."""
    steps, waves = request.param, {}
    noise = level_change(1, 1.0, 0, steps)
    for low in (0.45, 0.3):
        for period in PERIODS:
            waves[low, period] = np.where(np.arange(steps) // (period // 2) % 2, low, 1.0) * noise
    return spikes(waves), spikes(waves, recovery_window=None)


@pytest.mark.parametrize("low", [0.45, 0.3])
def test_alternating_level_is_clipped_no_more_than_published(low, alternating):
    """600 steps hold a period and a half of the slowest wave."""
    ours, published = alternating
    for period in PERIODS:
        assert ours[low, period].mean() <= published[low, period].mean() + 0.1, period


def test_recovery_from_an_outlier_in_the_warmup(found):
    assert found["reciprocal"]["outlier"][200::50].all()


@pytest.mark.parametrize("factor", [1.2, 1.5, 3, 10, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_normal_clip_rate_returns_within_200_steps(variant, factor, found):
    rows = {seed: found[variant]["change", factor, seed] for seed in SEEDS}
    before = [row[100 : change_step(seed)].mean() for seed, row in rows.items()]
    after = [row[change_step(seed) + 200 :].mean() for seed, row in rows.items()]
    assert np.mean(after) == pytest.approx(baseline_rate(found, variant), abs=0.005)
    assert 0.003 < np.mean(after) < 0.04 and 0.003 < np.mean(before) < 0.04


def test_published_rule_stays_locked_in(found):
    assert found["published"]["rise"][260:].all()


@pytest.fixture(scope="module")
def without_lasting_change() -> np.ndarray:
    """Forty declining traces with spikes after the warm-up, and fifteen consecutive ones in the middle."""
    draw = np.random.default_rng(1)
    traces = np.exp(0.1 * draw.standard_normal((40, 265)) - 0.0005 * np.arange(265))
    traces[:, 25:][draw.random((40, 240)) < 0.02] *= 8
    for i, trace in enumerate(traces):
        trace[120 + i : 135 + i] *= 5  # fifteen consecutive spikes are not a lasting change
    return traces


def decisions(traces: np.ndarray, **settings) -> Lanes:
    return replay_lanes(ZClip(**settings), traces)


@pytest.mark.parametrize("z_thresh", [1.5, 2.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decisions_are_the_published_ones_without_a_lasting_change(variant, z_thresh, without_lasting_change):
    """Six blocks of 40 in each trace; the consecutive spikes begin at every place in a block."""
    settings = {**VARIANTS[variant], "z_thresh": z_thresh}
    ours = decisions(without_lasting_change, **settings)
    published = decisions(without_lasting_change, **settings, recovery_window=None)
    np.testing.assert_array_equal(ours.coefficients, published.coefficients)
    np.testing.assert_array_equal(ours.state["mean"], published.state["mean"])
    np.testing.assert_array_equal(ours.state["var"], published.state["var"])
    assert ours.spikes.mean() > 0.02


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


def last_recovered(norms: list[float], warmup: list[float]) -> bool:
    """Return whether the last norm, which ends a block of 8, resets the statistics; these hardly move before."""
    zclip = ZClip(alpha=1 - 1e-9, warmup_steps=len(warmup), recovery_window=8)
    for norm in (*warmup, *norms):
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
    return bool(zclip.telemetry["recovered"])


@pytest.mark.parametrize(("count", "recovers"), [(5, False), (6, True), (8, True)])
def test_three_quarters_of_a_block_must_be_spikes(count, recovers):
    assert last_recovered([10.0] * count + [1.0] * (8 - count), warmup=[0.9, 1.1] * 5) == recovers


@pytest.mark.parametrize(("level", "recovers"), [(0.51, False), (0.49, True)])
def test_fall_must_be_below_half(level, recovers):
    assert last_recovered([level] * 16, warmup=[0.9, 1.1] * 5) == recovers
    assert not last_recovered([level] * 8, warmup=[0.9, 1.1] * 5), "a fall lasts two blocks"


@pytest.mark.parametrize(("ratio", "recovers"), [(3.8, False), (4.2, True)])
def test_deviation_must_be_four_times_that_of_the_block(ratio, recovers):
    wobble = 0.1 / ratio
    assert last_recovered([0.4 - wobble, 0.4 + wobble] * 8, warmup=[0.9, 1.1] * 5) == recovers


@pytest.mark.parametrize(("deviations", "spike"), [(2.49, False), (2.51, True)])
def test_deviation_is_at_least_a_ten_thousandth_of_the_mean(deviations, spike):
    zclip = ZClip(warmup_steps=2, eps=1e-12)
    for norm in (3.0, 3.0, 3.0 * (1 + 1e-4 * deviations)):
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
    assert bool(zclip.telemetry["spike"]) == spike
    assert float(zclip.telemetry["std"]) == pytest.approx(3e-4, rel=1e-9)
