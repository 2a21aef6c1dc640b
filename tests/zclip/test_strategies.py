"""Strategies that use more than the global norm, against float64 transcriptions of their equations."""

import math
import random
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from zclip import AGC, AdaGC, AutoClip, GradientStabilizer, GradStats, SkipStep
from zclip.norm import Shard


def parameters_with_gradients(seed: int, shapes=((7, 5), (5,), (3, 7, 2)), spike: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for i, shape in enumerate(shapes):
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64) * (spike if i == seed % 3 else 1.0)
        parameters.append(p)
    return parameters


def steps(n: int):
    for seed in range(n):
        parameters = parameters_with_gradients(seed, spike=30.0 if seed % 17 == 16 else 1.0)
        yield parameters, [p.grad.clone() for p in parameters]


def assert_gradient(parameter, expected):
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-9)


def test_adagc_follows_its_equations():
    clip = AdaGC(lambda_rel=1.1, beta=0.9, warmup_steps=10, lambda_abs=2.0)
    gamma = [math.inf] * 3
    for t, (parameters, before) in enumerate(steps(80)):
        norms = [float(g.norm()) for g in before]
        if t < 10:
            h = [min(2.0 / math.hypot(*norms), 1.0)] * 3
            gamma = [min(a, b * n) for a, b, n in zip(gamma, h, norms, strict=True)]
        else:
            h = [min(1.1 * a / n, 1.0) for a, n in zip(gamma, norms, strict=True)]
            gamma = [0.9 * a + 0.1 * b * n for a, b, n in zip(gamma, h, norms, strict=True)]
        clip.step(parameters)
        for p, g, b in zip(parameters, before, h, strict=True):
            assert_gradient(p, g * b)
        clipped_norm = math.hypot(*(b * n for b, n in zip(h, norms, strict=True)))
        assert clip.read_telemetry()["clipped_norm"] == pytest.approx(clipped_norm, rel=1e-6)


def test_gradient_stabilizer_follows_its_equations():
    clip = GradientStabilizer()
    m, v = [0.0] * 3, [0.0] * 3
    for t, (parameters, before) in enumerate(steps(60), start=1):
        clip.step(parameters)
        for i, (p, g) in enumerate(zip(parameters, before, strict=True)):
            n = float(g.norm())
            m[i] = 0.7 * m[i] + 0.3 * n
            v[i] = 0.9 * v[i] + 0.1 * n * n
            length = (m[i] / (1 - 0.7**t)) / (math.sqrt(v[i] / (1 - 0.9**t)) + 1e-8)
            assert_gradient(p, g / n * length)


def test_skip_step_follows_its_equations():
    clip = SkipStep(sigma=4.0, window=16)
    draw = random.Random(0)
    losses: list[float] = []
    norms: list[float] = []
    skipped = 0
    for t in range(200):
        loss = draw.gauss(3, 0.1) + (2 if t % 23 == 22 else 0)
        norm = draw.gauss(1, 0.05) + (1 if t % 37 == 36 else 0)
        skip = False
        if len(losses) >= 7:
            for value, history in ((loss, losses[-16:]), (norm, norms[-16:])):
                skip |= value - statistics.fmean(history) > 4 * statistics.stdev(history)
        losses.append(loss)
        norms.append(norm)
        coefficient = clip.observe(torch.tensor(norm, dtype=torch.float64), torch.tensor(loss, dtype=torch.float64))
        assert float(coefficient) == (0.0 if skip else 1.0), t
        skipped += skip
    assert 8 < skipped < 20


@pytest.mark.parametrize(("count", "skipped"), [(2, False), (3, True)])
def test_skip_step_waits_for_half_a_window(count, skipped):
    clip = SkipStep(window=9)
    for norm in (1.0, 1.01, 1.0)[:count]:
        clip.observe(torch.tensor(norm))
    assert float(clip.observe(torch.tensor(100.0))) == 1 - skipped
    assert bool(clip.telemetry["skipped"]) == skipped


def test_skip_step_skips_nonfinite_losses_and_excludes_them():
    clip = SkipStep()
    for loss, coefficient in ((1.0, 1.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, 1.0)):
        assert float(clip.observe(torch.tensor(1.0), torch.tensor(loss))) == coefficient
    assert torch.isfinite(clip.state["losses"]).all()


def test_skip_step_ignores_a_missing_loss():
    clip = SkipStep(window=8)
    for _ in range(12):
        assert float(clip.observe(torch.tensor(1.0))) == 1.0
    assert float(clip.observe(torch.tensor(1.0), torch.tensor(5.0))) == 1.0


def test_agc_follows_its_equation():
    clip = AGC(ratio=0.1, eps=1e-3)
    for parameters, before in steps(20):
        parameters[0].data[2] = 0
        before[0][3] = parameters[0].grad[3] = 0
        clip.step(parameters)
        for p, g in zip(parameters, before, strict=True):
            expected = g.clone()
            rows = [()] if g.ndim < 2 else [(i,) for i in range(len(g))]
            for row in rows:
                n = float(g[row].norm())
                if n > 0:
                    expected[row] = g[row] * min(1.0, 0.1 * max(float(p[row].detach().norm()), 1e-3) / n)
            assert_gradient(p, expected)
        clipped_norm = math.hypot(*(float(p.grad.norm()) for p in parameters))
        assert clip.read_telemetry()["clipped_norm"] == pytest.approx(clipped_norm, rel=1e-6)
    with pytest.raises(ValueError, match="a norm alone"):
        clip.observe(torch.tensor(1.0))


def test_stabilizer_adds_eps_to_the_root_of_the_second_moment():
    assert float(GradientStabilizer(eps=0.25).observe(torch.tensor(1.0))) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("make", [AdaGC, GradientStabilizer])
def test_coefficient_of_a_zero_gradient_is_one(make):
    norms = torch.tensor([0.0, 4.0], dtype=torch.float64)
    result = make().clip(GradStats(norms.norm(), norms), make().initial_state(torch.zeros_like(norms)))
    assert result.coefficients.tolist() == pytest.approx([1.0, 0.25])


def test_agc_rejects_flattened_weights_and_leaves_zero_gradients():
    one, norm = nn.Parameter(torch.ones(2, 2)), torch.ones((), dtype=torch.float64)
    stats = GradStats(
        norm, norm.reshape(1), shards=[Shard(one, ())], gradients=[torch.tensor([[0.0, 0.0], [3.0, 4.0]])]
    )
    result = AGC().clip(stats, {})
    assert result.coefficients[0].flatten().tolist() == pytest.approx([1.0, 0.01 * 2**0.5 / 5], rel=1e-6)
    assert result.clipped_norm.dtype == result.telemetry["clipped_units"].dtype == torch.float64
    flattened = stats._replace(shards=[Shard(one, (object(),))])
    with pytest.raises(ValueError) as error:
        AGC().clip(flattened, {})
    assert str(error.value) == "AGC needs the rows of weights, which FSDP1 flattens: shard with FSDP2 instead"


@pytest.mark.parametrize("make", [AdaGC, GradientStabilizer, AGC])
def test_tensors_without_gradients_are_ignored(make):
    clip = make()
    for t in range(120):
        parameters = parameters_with_gradients(t)
        parameters[1].grad = None
        parameters[2].grad.zero_()
        clip.step(parameters)
        assert parameters[1].grad is None and not parameters[2].grad.any()
        assert torch.isfinite(parameters[0].grad).all()
    first_only = make()
    for t in range(120):
        parameters, one = parameters_with_gradients(t), parameters_with_gradients(t)
        parameters[1].grad = parameters[2].grad = None
        one[1].grad = one[2].grad = None
        norm = first_only.step(one[0])
        assert float(norm) > 0
    if make is not AGC:
        with pytest.raises(ValueError, match=r"has statistics of 1 tensor \(parameter 0 of shape"):
            first_only.step(parameters_with_gradients(0))


@pytest.mark.parametrize("window", [None, 20])
def test_norms_of_zero_do_not_make_autoclip_zero_the_gradients(window):
    """By the paper's rule the threshold would be 0 from the second step on."""
    strategy = AutoClip(percentile=10, window=window)
    norms = [0.0, 0.0, 3.0, 0.0, 2.0, 4.0, 0.0, 1.0]
    coefficients = [float(strategy.observe(torch.tensor(norm, dtype=torch.float64))) for norm in norms]
    positive = [norm for norm in norms if norm]
    expected = np.percentile(positive, 10)
    assert strategy.read_telemetry()["threshold"] == pytest.approx(expected)
    assert coefficients == pytest.approx([1, 1, 1, 1, 1, np.percentile([3, 2, 4], 10) / 4, 1, 1], rel=1e-6)
    for _ in range(100):
        assert strategy.observe(torch.tensor(5.0)) > 0.1
