"""Non-finite and extreme norms: policies, limits, and a fuzz test of every strategy."""

import math
import random

import pytest
import torch
from torch import nn

from tests.zclip.every_strategy import CLASSES, SHORT
from zclip import ZClip


def linear_with_gradients(value: float | None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    if value is not None:
        model.weight.grad[1, 2] = value
    return model


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_nonfinite_norms_leave_no_trace(make):
    """Non-finite norms change neither the statistics nor later gradients."""
    draw = random.Random(0)
    with_nonfinite, without = make(), make()
    nonfinite, values = 0, [math.nan, math.inf, -math.inf, 1e38, -3e38]
    for t in range(40):
        if t == 0 or draw.random() < 0.3:
            model = linear_with_gradients(values[nonfinite % len(values)], t)
            nonfinite += 1
            with_nonfinite.step(model)
            assert not any(p.grad.any() for p in model.parameters())
            assert with_nonfinite.read_telemetry()["nonfinite"] == nonfinite
        one, other = linear_with_gradients(None, t), linear_with_gradients(None, t)
        with_nonfinite.step(one)
        without.step(other)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) and torch.isfinite(p.grad).all()
    assert nonfinite >= len(values)
    assert all(torch.equal(with_nonfinite.state[key], without.state[key]) for key in without.state)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, 1e-8, 1e15])
def test_tiny_huge_and_zero_gradients_stay_finite(make, scale):
    """30 steps are more than the warm-up of `ZClip`."""
    strategy = make()
    for t in range(30):
        model = linear_with_gradients(None, t)
        for p in model.parameters():
            p.grad.mul_(scale if t % 3 else 1.0)
        strategy.step(model)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert all(torch.isfinite(v.double()).all() for k, v in strategy.state.items() if k not in ("gamma", "history"))


def test_zero_policy_steps_with_zero_gradients():
    zclip = ZClip(on_nonfinite="zero")
    model = linear_with_gradients(math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    before = model.weight.detach().clone()
    zclip.step(model, optimizer=optimizer)
    assert not model.weight.grad.any()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * 0.95)


def test_raise_policy_names_the_parameters():
    zclip = ZClip(on_nonfinite="raise")
    zclip.step(linear_with_gradients(None))
    with pytest.raises(FloatingPointError, match=r"norm is nan; so are .* gradients of weight of shape \(3, 4\)$"):
        zclip.step(linear_with_gradients(math.nan))
    with pytest.raises(FloatingPointError, match=r"gradients of parameter 0 of shape \(3, 4\)$"):
        zclip.step(linear_with_gradients(math.nan).parameters())
    with pytest.raises(ValueError, match="on_nonfinite=ignore is not allowed: it must be one of skip, zero, raise"):
        zclip.on_nonfinite = "ignore"
    assert zclip.on_nonfinite == "raise"


@pytest.mark.parametrize("make", CLASSES)
def test_every_strategy_takes_a_policy_and_checks_it(make):
    strategy = make(on_nonfinite="zero", max_consecutive_nonfinite=None)
    assert (strategy.on_nonfinite, strategy.max_consecutive_nonfinite) == ("zero", None)
    make().load_state_dict(strategy.state_dict())
    with pytest.raises(ValueError, match="on_nonfinite=ignore is not allowed: it must be one of skip, zero, raise"):
        make(on_nonfinite="ignore")
    with pytest.raises(ValueError, match="max_consecutive_nonfinite=0 is not allowed: it must be an integer from 1"):
        make(max_consecutive_nonfinite=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        make(alhpa=0.9)


def test_consecutive_nonfinite_norms_raise_at_the_limit():
    zclip = ZClip(max_consecutive_nonfinite=3)
    for value in (math.nan, math.nan, None, math.nan, math.inf):
        zclip.step(linear_with_gradients(value))
    assert zclip.read_telemetry()["consecutive_nonfinite"] == 2
    restored = ZClip(max_consecutive_nonfinite=3)
    restored.load_state_dict(zclip.state_dict())
    with pytest.raises(FloatingPointError, match=r"3 times in a row.*Restart from an earlier checkpoint"):
        restored.step(linear_with_gradients(math.nan))
