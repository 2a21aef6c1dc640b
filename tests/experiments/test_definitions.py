"""Definitions of terms that the paper leaves open, on series worked out by hand."""

import numpy as np
import pytest

from experiments.run.definitions import (
    Spike,
    corrupted_spans,
    diverged,
    excess_loss,
    loss_dips,
    loss_spikes,
    min_spike_height,
    recovery_steps,
    skip_cost,
    spike_score,
    tokens_to_reach,
)

# Mean 1.1, standard deviation 0.1; median 1.1, median absolute deviation 0.1.
STEADY = [1.0, 1.2] * 25
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("loss", "corrupted_rows", "spikes"),
    [
        ([*STEADY, 9.0, *STEADY], {50}, []),
        ([*STEADY, 9.0, 3.0, 2.0, *STEADY], {50}, [Spike(51, 2)]),
        ([*STEADY, 3.0, 9.0, 3.0, *STEADY], {51}, [Spike(50, 3)]),
        ([*STEADY, 3.0, 9.0, 1.0, 3.0], {51}, [Spike(50, 1), Spike(53, 1)]),
        ([*STEADY, NAN, 1.0], {50}, []),
    ],
)
def test_corrupted_batches_neither_belong_to_spikes_nor_end_them(loss, corrupted_rows, spikes):
    assert loss_spikes(np.array(loss), corrupted_rows) == spikes


def test_a_spike_is_five_robust_deviations_above_the_median():
    """1.1 + 5 * 1.4826 * 0.1 = 1.8413; steps in spikes are never normal, however long they last."""
    assert loss_spikes(np.array([*STEADY, 1.84])) == []
    assert loss_spikes(np.array([*STEADY, 1.85])) == [Spike(50, 1)]
    assert loss_spikes(np.array([*STEADY, *[9.0] * 60, 1.85, 1.1])) == [Spike(50, 61)]
    assert min_spike_height(np.array([*STEADY, 1.1])) == pytest.approx(0.7413)
    # With the 1.1 in the median's window it is 1.15 with a deviation of 0.05, then 1.05: limits 1.52065 and 1.42065.
    assert min_spike_height(np.array([*STEADY, 9.0, 1.1, 1.0, 1.2]), {50}) == pytest.approx(0.52065)
    assert np.isnan(min_spike_height(np.array(STEADY)))
    # Steps in spikes, which are the majority here, do not count.
    assert min_spike_height(np.array([*STEADY, 1.1, *[9.0] * 5])) == pytest.approx(0.7413)


def test_dips_are_spikes_downwards():
    """1.1 - 0.7413 = 0.3587; NaN and steps in spikes are not dips."""
    assert loss_dips(np.array([0.36, *STEADY])) == 0 and loss_dips(np.array([0.35, *STEADY])) == 1
    assert loss_dips(np.array([*STEADY, 0.35])) == 0, "read from the end the first fifty are not judged"
    assert loss_dips(np.array([*STEADY, 0.35, 0.3, 1.1, NAN, 0.3, *STEADY])) == 2
    assert loss_dips(np.array([*STEADY, *[9.0] * 60, *STEADY])) == 0, "a loss that comes back from a spike"
    assert loss_dips(np.array([*STEADY, 0.1, 1.0, *STEADY]), {50}) == 0


def test_a_falling_loss_has_as_many_dips_as_spikes():
    """Dips and spikes are equally far from the normal level."""
    rng = np.random.default_rng(0)
    up = down = 0
    for _ in range(12):
        loss = np.linspace(4, 2.8, 1000) + 0.05 * rng.standard_t(3, 1000)
        up, down = up + len(loss_spikes(loss)), down + loss_dips(loss)
    assert up > 30 and abs(up - down) < 3 * (up + down) ** 0.5, (
        "read from its beginning it has about twice as many dips"
    )
    later = np.where(np.arange(400) < 200, 4.0, 2.0) + 0.1 * np.sin(np.arange(400))
    later[[260, 300]] = 1.0
    assert loss_dips(later) == 2, "those after it has fallen to another level"


def test_a_spike_score_looks_back_a_thousand_steps():
    assert spike_score(np.array([*[5.0, -5.0] * 50, *STEADY * 20, 1.81])) == pytest.approx(1 / 1051)


@pytest.mark.parametrize(
    ("values", "corrupted_rows", "score"),
    [
        (STEADY, (), NAN),
        ([*STEADY, 1.1], (), 0.0),
        ([*STEADY, 1.79], (), 0.0),
        ([*STEADY, 1.81], (), 1.0),
        ([*STEADY, 0.39], (), 1.0),
        ([*STEADY, 1.81, 1.1], (), 0.5),
        ([*STEADY, NAN, 1.1], (), 0.5),
        ([*STEADY, 1.81, 1.1], (50,), 0.0),
    ],
)
def test_spike_score(values, corrupted_rows, score):
    assert spike_score(np.array(values), corrupted_rows) == pytest.approx(score, nan_ok=True)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (list(np.linspace(7, 2, 100)), False),
        ([*np.linspace(7, 2, 90), *[2.49] * 10], False),
        ([*np.linspace(7, 2, 80), *[2.0] * 10, *[2.51] * 10], True),
        ([*np.linspace(7, 2, 80), *[2.0] * 10, *[2.49] * 10], False),
        ([*[2.0] * 99, NAN], True),
        ([*[2.0] * 50, INF, *[2.0] * 49], False),
        ([*[2.0] * 50, NAN, *[2.0] * 39, *[2.51] * 10], True),
        ([2.0], False),
    ],
)
def test_a_run_has_diverged_half_a_nat_above_its_lowest_level(loss, expected):
    assert diverged(np.array(loss)) is expected


def test_tokens_to_reach_a_loss():
    tokens = np.arange(1, 101) * 10.0
    loss = np.array([5.0] * 40 + [3.0] * 60)
    assert tokens_to_reach(loss, tokens, 5.0) == 200, "the first 20 steps"
    assert tokens_to_reach(loss, tokens, 4.0) == 500, "ten of each"
    assert tokens_to_reach(loss, tokens, 3.0) == 600
    assert tokens_to_reach(loss, tokens, 2.9) is None
    assert tokens_to_reach(loss, tokens, 3.0 * (1 - 1e-13)) == 600, "rounding does not count"
    loss[45] = NAN
    assert tokens_to_reach(loss, tokens, 3.0) == 660, "a loss that is not finite reaches nothing"
    assert tokens_to_reach(np.array([2.0, 1.0]), np.array([1.0, 2.0]), 1.5) == 2, "of fewer steps all"


def test_skip_cost():
    """The loss falls by 0.01 a step: after one it is a step behind, after three in a row three."""
    falling = 6 - 0.01 * np.arange(60)
    assert skip_cost(falling, {10}) == pytest.approx(0.01)
    assert skip_cost(falling, {10, 11, 12}) == pytest.approx(0.03)
    assert skip_cost(falling, {10, 30}) == pytest.approx(0.015), "one, and two"
    assert skip_cost(-falling, {10}) == 0
    both = np.concatenate([falling, falling[-1] + 0.02 * np.arange(60)])
    assert skip_cost(both, {20, 100}) == 0, "0.01, and two times -0.02: none on the mean"
    bent = np.where(np.arange(200) < 100, 0.0, -0.01 * (np.arange(200) - 100.0))
    assert skip_cost(bent, {75}) == 0 and skip_cost(bent, {125}) == pytest.approx(0.01)
    # Of 25 steps before and 25 from it on, with time t from -24.5 to 24.5: the sum of t * max(0, t - 0.5) over t * t.
    t = np.arange(50) - 24.5
    assert skip_cost(bent, {100}) == pytest.approx(0.01 * (t @ np.maximum(0, t - 0.5)) / (t @ t))
    assert np.isnan(skip_cost(np.where(np.arange(60) == 20, NAN, falling), {10}))


def test_corrupted_batches_followed_by_no_step():
    assert corrupted_spans({59}, 60) == corrupted_spans({58, 59}, 60) == corrupted_spans(set(), 60) == []
    assert corrupted_spans({10, 11, 30}, 60) == [(11, 30), (30, 60)]


def test_a_loss_below_the_baseline():
    baseline = np.full(60, 2.0)
    assert (
        excess_loss(baseline - 0.1, baseline, {10}) == pytest.approx(-0.1)
        and recovery_steps(baseline - 0.1, baseline, {10}) == 0
    )


def test_excess_loss_and_recovery():
    baseline = np.full(60, 2.0)
    loss = baseline.copy()
    loss[10] = 9.0  # the corrupted batch itself
    loss[11:16] += 0.4
    assert excess_loss(loss, baseline, {10}) == pytest.approx(0.2)
    # Means of five from step 11 on: 0.4, 0.32, 0.24, 0.16, 0.08, 0.
    assert recovery_steps(loss, baseline, {10}) == 5
    assert recovery_steps(baseline, baseline, {10}) == 0
    loss[30] = 9.0
    assert excess_loss(loss, baseline, {10, 30}) == pytest.approx(0.1), "the mean over the corrupted batches"
    assert recovery_steps(loss, baseline, {10, 30}) == 2.5
    loss = baseline.copy()
    loss[[10, 15]] = 9.0
    loss[11:15] += 0.4
    assert excess_loss(loss, baseline, {10, 15}) == pytest.approx(0.2), "0.4 up to the next corrupted batch, then none"
    # Two in a row count as one: nothing is between them. The last has four steps to the end.
    loss = baseline.copy()
    loss[[54, 55]] = 9.0
    loss[56:] += 1.0
    assert excess_loss(loss, baseline, {54, 55}) == pytest.approx(1.0)
    assert recovery_steps(loss, baseline, {54, 55}) == 4
