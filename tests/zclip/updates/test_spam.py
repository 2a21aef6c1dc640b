"""SPAM's clipping of elements is that of the paper, before torch's own optimizers take their steps."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zclip.updates.pieces
from tests.helpers import same
from zclip import ZClip
from zclip.updates import SPAM, StableAdamW

LR, STEPS, SHAPES = 0.02, 40, ((4, 6), (9,), (), (3, 2, 2))


class SPAMEquations:
    """The clipping of Algorithm 1 of arXiv 2501.06842 and AdamW for one tensor, element by element in float64."""

    def __init__(self, weights, theta=5000.0, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01) -> None:
        self.theta, self.lr, self.betas, self.eps, self.decay = theta, lr, betas, eps, weight_decay
        self.shape = np.shape(weights)
        self.w = [float(x) for x in np.ravel(weights)]
        self.m, self.v, self.t, self.clipped = [0.0] * len(self.w), [0.0] * len(self.w), 0, 0

    def step(self, gradient) -> None:
        self.t, self.clipped = self.t + 1, 0
        beta1, beta2 = self.betas
        for i, g in enumerate(float(x) for x in np.ravel(gradient)):
            if self.v[i] > 0 and g**2 > self.theta * self.v[i]:
                g, self.clipped = math.copysign(math.sqrt(self.theta * self.v[i]), g), self.clipped + 1
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            m, v = self.m[i] / (1 - beta1**self.t), self.v[i] / (1 - beta2**self.t)
            self.w[i] -= self.lr * (self.decay * self.w[i] + m / (math.sqrt(v) + self.eps))

    @property
    def weights(self) -> torch.Tensor:
        return torch.tensor(self.w, dtype=torch.float64).reshape(self.shape)


def tensors(dtype=torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=draw).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Gradients with single elements that are large, and one that is 0 until step 20."""
    draw = torch.Generator().manual_seed(step)
    found = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in SHAPES]
    if step % 6 == 5:
        found[step % 4].view(-1)[0] *= -1e4
    found[0][0, 1] *= step >= 20
    return [gradient.to(dtype) for gradient in found]


@pytest.mark.parametrize("arguments", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("bucket", [5, 1 << 19])
def test_steps_are_those_of_the_paper(arguments, bucket, monkeypatch):
    monkeypatch.setattr(zclip.updates.pieces, "BUCKET", bucket)
    parameters, rule, clipped = tensors(), SPAM(), 0
    equations = [SPAMEquations(p.detach().numpy()) for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LR, **arguments)
    rule.attach(optimizer)
    for step in range(STEPS):
        for p, equation, gradient in zip(parameters, equations, gradients(step), strict=True):
            equation.step(gradient)
            p.grad = gradient
        optimizer.step()
        number = sum(e.clipped for e in equations)
        expected = {"clipped_element_share": number / 46, "update_clipped": float(number > 0)}
        assert rule.read_telemetry() == pytest.approx(expected)
        clipped += number
        for p, equation in zip(parameters, equations, strict=True):
            torch.testing.assert_close(p.detach(), equation.weights, rtol=1e-9, atol=1e-12)
    assert 6 <= clipped < 46 * STEPS / 4
    assert optimizer.param_groups[0]["lr"] == LR


@settings(deadline=None, max_examples=50)
@given(st.floats(1.5, 1e6), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_no_element_with_a_past_is_above_its_bound_and_others_keep_their_bits(theta, values):
    parameter = nn.Parameter(torch.zeros(len(values)))
    optimizer, rule = torch.optim.AdamW([parameter], lr=0.0), SPAM(theta)
    rule.attach(optimizer)
    parameter.grad = torch.linspace(0.0, 1.0, len(values))  # the first element has no past
    optimizer.step()
    v = optimizer.state[parameter]["exp_avg_sq"].double().clone()
    before = parameter.grad = torch.tensor(values)
    parameter.grad = before.clone()
    optimizer.step()
    after, bound = parameter.grad.double(), (theta * v).sqrt()
    assert ((after.abs() <= bound * (1 + 1e-6)) | (v == 0)).all()
    inside = (before.double().abs() <= bound * (1 - 1e-6)) | (v == 0)
    assert torch.equal(parameter.grad[inside], before[inside])
    assert (after * before.double() >= 0).all()


@pytest.mark.parametrize("layout", ["expanded", "column", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_half_precision_do_not_matter(layout, dtype):
    draw = torch.Generator().manual_seed(0)
    parameter, rule = nn.Parameter(torch.ones(4, 6, dtype=dtype)), SPAM(theta=20.0)
    optimizer = torch.optim.AdamW([parameter], lr=LR)
    rule.attach(optimizer)
    acted = 0
    for _ in range(8):
        wide = torch.randn(4, 6, 5, generator=draw).to(dtype)
        gradient = {
            "expanded": wide[:, :1, 0].expand(4, 6),
            "column": wide[..., 0],
            "transposed": wide[:, :, 0].t().contiguous().t(),
        }
        parameter.grad = gradient[layout].clone(memory_format=torch.preserve_format)
        state = optimizer.state.get(parameter, {})
        expected = parameter.grad.float()
        if state:
            bound = (20.0 * state["exp_avg_sq"].float()).sqrt()
            acted += int((expected.abs() > bound).sum())
            expected = torch.maximum(torch.minimum(expected, bound), -bound)
        optimizer.step()
        torch.testing.assert_close(parameter.grad, expected.to(dtype), rtol=1e-6, atol=0.0)
    assert acted > 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule_first", [False, True])
def test_strategy_acts_first_on_the_norm_of_the_unclipped_gradients(fused, rule_first):
    parameters, rule, zclip = tensors(), SPAM(theta=100.0), ZClip(warmup_steps=5)
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=fused)
    for part in (rule, zclip) if rule_first else (zclip, rule):
        part.attach(optimizer)
    acted = 0
    for step in range(24):
        before = gradients(step)
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient.clone()
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in parameters] if step else [torch.zeros(())] * 4
        optimizer.step()
        telemetry = zclip.read_telemetry()
        assert telemetry["grad_norm"] == pytest.approx(math.hypot(*(float(g.norm()) for g in before)))
        coefficient = telemetry["clipped_norm"] / telemetry["grad_norm"]
        for p, gradient, v in zip(parameters, before, moments, strict=True):
            bound = torch.where(v > 0, (100.0 * v).sqrt(), math.inf)
            expected = torch.clamp(coefficient * gradient, -bound, bound)
            torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-12)
        acted += bool(coefficient < 1 and rule.read_telemetry()["update_clipped"])
    assert acted > 0


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_a_fused_step_unscales_are_compared_as_it_sees_them(fused):
    both = [tensors(torch.float32) for _ in range(2)]
    optimizers, rules = [torch.optim.AdamW(ps, lr=LR, fused=fused) for ps in both], [SPAM() for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
    for rule, optimizer in zip(rules, optimizers, strict=True):
        rule.attach(optimizer)
    for step in range(STEPS):
        for factor, parameters in ((1.0, both[0]), (64.0, both[1])):
            for p, gradient in zip(parameters, gradients(step, torch.float32), strict=True):
                p.grad = factor * gradient
        optimizers[0].step()
        scaler.scale(torch.ones(()))
        scaler.step(optimizers[1])
        scaler.update()
        assert rules[0].read_telemetry() == rules[1].read_telemetry()
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_not_finite_and_steps_without_gradients():
    parameters, rule = tensors(), SPAM()
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    rule.attach(optimizer)
    optimizer.step()
    assert math.isnan(rule.read_telemetry()["clipped_element_share"])
    for step in range(3):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = gradient
        if step == 2:
            parameters[0].grad[1, 1], parameters[0].grad[1, 2] = math.nan, -math.inf
        bound = (5000 * optimizer.state[parameters[0]]["exp_avg_sq"]).sqrt() if step else None
        optimizer.step()
    assert parameters[0].grad[1, 1].isnan() and parameters[0].grad[1, 2] == -bound[1, 2]


def test_resumed_run_continues_bit_for_bit():
    parameters = tensors(torch.float32)
    optimizer, rule = torch.optim.AdamW(parameters, lr=LR, fused=True), SPAM(theta=50.0)
    rule.attach(optimizer)
    for step in range(STEPS):
        for p, gradient in zip(parameters, gradients(step, torch.float32), strict=True):
            p.grad = gradient
        if step == 20:
            file = io.BytesIO()
            torch.save((parameters, optimizer.state_dict(), rule.state_dict()), file)
        optimizer.step()
    file.seek(0)
    loaded, optimizer_state, rule_state = torch.load(file, weights_only=True)
    optimizer, resumed = torch.optim.AdamW(loaded, lr=LR, fused=True), SPAM(theta=50.0)
    optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(rule_state)
    resumed.attach(optimizer)
    for step in range(20, STEPS):
        for p, gradient in zip(loaded, gradients(step, torch.float32), strict=True):
            p.grad = gradient
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, loaded, strict=True))
    assert same(rule.state_dict(), resumed.state_dict())
    with pytest.raises(ValueError, match=r"was made with theta=50\.0, not 5000\.0"):
        SPAM().load_state_dict(rule_state)


def test_mistakes_are_one_sentence():
    for theta in (1, 0.5, math.inf, math.nan, "x"):
        with pytest.raises(ValueError, match=r"^theta=.* is not allowed: it must be a finite number above 1$"):
            SPAM(theta)
    optimizer = torch.optim.AdamW(tensors())
    SPAM().attach(optimizer)
    with pytest.raises(ValueError, match=r"^a rule over updates is attached to this optimizer already: detach\(\)"):
        StableAdamW().attach(optimizer)
    with pytest.raises(TypeError, match=r"^SGD has no second moment: Adam and AdamW of torch are supported$"):
        SPAM().attach(torch.optim.SGD(tensors()))
