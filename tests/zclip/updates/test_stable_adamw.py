"""StableAdamW takes the steps of the paper's Algorithm 2, by torch's own optimizers at rates of their own."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import zclip.updates.pieces
from tests.helpers import same
from zclip import SkipStep, ZClip
from zclip.updates import StableAdamW, UpdateClip, update_rms

LR, STEPS = 0.02, 60
SHAPES = ((4, 6), (9,), (), (3, 2, 2))


class StableAdamWEquations:
    """Algorithm 2 of arXiv 2304.13013 for one tensor in float64, with the paper's averages of corrected weights."""

    def __init__(self, weights, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, l2=False, amsgrad=False,
                 maximize=False):  # fmt: skip
        self.theta = np.array(weights, dtype=np.float64)
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.l2, self.amsgrad, self.maximize = l2, amsgrad, maximize
        self.t, self.v, self.u, self.largest, self.rms = 0, 0.0, 0.0, 0.0, math.nan

    def step(self, gradient: torch.Tensor) -> None:
        g = gradient.double().numpy() * (-1 if self.maximize else 1)
        if self.l2:
            g = g + self.decay * self.theta
        self.t += 1
        beta1, beta2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        self.v = beta1 * self.v + (1 - beta1) * g
        self.u = beta2 * self.u + (1 - beta2) * g**2
        u, correction = self.u, 1 - self.betas[1] ** self.t
        if self.amsgrad:  # the maximum is that of the moments before their correction
            self.largest = np.maximum(self.largest, u * correction)
            u = self.largest / correction
        self.rms = math.sqrt(np.mean(g**2 / np.maximum(u, max(self.eps**2, 5e-324))))
        eta = self.lr / max(1.0, self.rms)
        decay = 0.0 if self.l2 else self.decay
        self.theta = self.theta - eta * decay * self.theta - eta * self.v / (np.sqrt(u) + self.eps)


def tensors(dtype=torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=draw).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Gradients that shrink, with a burst in each tensor at a time of its own, and one element that is always 0."""
    draw = torch.Generator().manual_seed(step)
    found = []
    for i, shape in enumerate(SHAPES):
        size = 0.97**step * (40.0 if step % 17 == 5 + i else 1.0)
        found.append(size * torch.randn(shape, dtype=torch.float64, generator=draw))
    found[0][0, 0] = 0.0
    return [gradient.to(dtype) for gradient in found]


OPTIMIZERS = {
    "fused": (torch.optim.AdamW, {"fused": True}, {}),
    "foreach": (torch.optim.AdamW, {"foreach": True}, {}),
    "one by one": (torch.optim.AdamW, {"foreach": False}, {}),
    "tensor rate": (torch.optim.AdamW, {"fused": True, "lr": torch.tensor(LR, dtype=torch.float64)}, {}),
    "other betas": (torch.optim.AdamW, {"betas": (0.5, 0.7)}, {"betas": (0.5, 0.7)}),
    "large eps": (torch.optim.AdamW, {"eps": 0.3, "fused": True}, {"eps": 0.3}),
    "decay": (torch.optim.AdamW, {"weight_decay": 0.5, "fused": True}, {"weight_decay": 0.5}),
    "no eps": (torch.optim.AdamW, {"eps": 1e-200, "weight_decay": 0.0}, {"eps": 1e-200, "weight_decay": 0.0}),
    "penalty": (torch.optim.Adam, {"weight_decay": 0.3, "fused": True}, {"weight_decay": 0.3, "l2": True}),
    "maximize": (
        torch.optim.Adam, {"weight_decay": 0.3, "maximize": True}, {"weight_decay": 0.3, "l2": True, "maximize": True},
    ),
    "amsgrad": (
        torch.optim.AdamW, {"amsgrad": True, "betas": (0.9, 0.8)}, {"amsgrad": True, "betas": (0.9, 0.8)},
    ),
    "amsgrad fused": (
        torch.optim.AdamW, {"amsgrad": True, "betas": (0.9, 0.8), "fused": True},
        {"amsgrad": True, "betas": (0.9, 0.8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_paper(name):
    make, arguments, settings = OPTIMIZERS[name]
    parameters, rule = tensors(), StableAdamW()
    equations = [StableAdamWEquations(p.detach().numpy(), **settings) for p in parameters]
    optimizer = make(parameters, **{"lr": LR, "weight_decay": 0.01, **arguments})
    rule.attach(optimizer)
    highest, clipped = [], 0
    for step in range(STEPS):
        for p, equation, gradient in zip(parameters, equations, gradients(step), strict=True):
            p.grad = gradient
            if step % 7 == 3 and p.ndim == 1:
                p.grad = None  # its counter stays behind
            else:
                equation.step(gradient)
        optimizer.step()
        taken = [e.rms for p, e in zip(parameters, equations, strict=True) if p.grad is not None]
        telemetry = rule.read_telemetry()
        assert telemetry["update_rms"] == pytest.approx(max(taken), rel=1e-9)
        assert telemetry["update_clipped_tensors"] == sum(rms > 1 + 1e-5 for rms in taken)
        assert telemetry["lowest_update_scale"] == pytest.approx(1 / max(1.0, *taken), rel=2e-5)
        assert telemetry["update_clipped"] == (max(taken) > 1 + 1e-5)
        highest.append(max(taken))
        clipped += sum(rms > 1 + 1e-5 for rms in taken)
        for p, equation in zip(parameters, equations, strict=True):
            torch.testing.assert_close(p.detach(), torch.from_numpy(np.array(equation.theta)), rtol=1e-7, atol=1e-9)
    assert max(highest) > 1.5 and min(highest[1:]) < 1 and 0 < clipped < 3 * STEPS


def test_groups_have_their_own_settings():
    settings = (
        {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2},
        {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
    )
    parameters, rule = tensors(), StableAdamW()
    members = (parameters[:1], parameters[1:])
    equations = [
        StableAdamWEquations(p.detach().numpy(), **s) for s, ps in zip(settings, members, strict=True) for p in ps
    ]
    groups = [{"params": ps, **s} for s, ps in zip(settings, members, strict=True)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    rule.attach(optimizer)
    for step in range(STEPS):
        for p, equation, gradient in zip(parameters, equations, gradients(step), strict=True):
            p.grad = gradient
            equation.step(gradient)
        optimizer.step()
        assert rule.read_telemetry()["update_rms"] == pytest.approx(max(e.rms for e in equations), rel=1e-9)
    for p, equation in zip(parameters, equations, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(np.array(equation.theta)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_tensors_take_the_steps_of_the_plain_optimizer_at_their_rates_bit_for_bit(dtype, fused):
    stable, plain = tensors(dtype), tensors(dtype)
    equations = [StableAdamWEquations(p.detach().double().numpy()) for p in stable]
    optimizer, rule = torch.optim.AdamW(stable, lr=LR, fused=fused), StableAdamW()
    rule.attach(optimizer)
    by_hand = torch.optim.AdamW([{"params": [p]} for p in plain], lr=LR, fused=fused)
    for step in range(STEPS):
        for p, q, equation, gradient in zip(stable, plain, equations, gradients(step, dtype), strict=True):
            p.grad, q.grad = gradient, gradient.clone()
            equation.step(gradient)
        measured = update_rms(by_hand)
        expected = torch.tensor([e.rms for e in equations], dtype=torch.float64)
        torch.testing.assert_close(measured, expected, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=0.0)
        for group, rms in zip(by_hand.param_groups, measured.tolist(), strict=True):
            group["lr"] = LR * (1 / rms) if rms > 1 + 1e-5 else LR
        by_hand.step()
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(stable, plain, strict=True)), step
        assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == LR
    state = optimizer.state_dict()["state"]
    assert same(state, by_hand.state_dict()["state"])


def test_gradients_that_shrink_leave_the_plain_optimizer_alone():
    stable, plain = tensors(torch.float32), tensors(torch.float32)
    optimizers = [torch.optim.AdamW(parameters, lr=LR) for parameters in (stable, plain)]
    rule = StableAdamW()
    rule.attach(optimizers[0])
    for step in range(20):
        for parameters in (stable, plain):
            for p, gradient in zip(parameters, gradients(0, torch.float32), strict=True):
                p.grad = gradient * 0.9**step
        for optimizer in optimizers:
            optimizer.step()
        telemetry = rule.read_telemetry()
        assert telemetry["update_clipped"] == 0 and telemetry["lowest_update_scale"] == 1.0
        assert telemetry["update_rms"] == pytest.approx(1.0, abs=1e-5) if step == 0 else telemetry["update_rms"] < 1
    assert all(torch.equal(p, q) for p, q in zip(stable, plain, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_zclip", [False, True])
def test_steps_that_a_grad_scaler_skips_change_nothing(fused, with_zclip):
    both = [tensors(torch.float32) for _ in range(2)]
    optimizers = [torch.optim.AdamW(parameters, lr=LR, fused=fused) for parameters in both]
    rules = [StableAdamW() for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
    for rule, optimizer in zip(rules, optimizers, strict=True):
        rule.attach(optimizer)
        if with_zclip:
            ZClip(warmup_steps=5, z_thresh=0.5).attach(optimizer)

    def scaled_step(step: int, factor: float) -> None:
        scaler.scale(torch.ones(()))  # as of a loss
        for p, gradient in zip(both[1], gradients(step, torch.float32), strict=True):
            p.grad = factor * gradient
        scaler.step(optimizers[1])
        scaler.update(64.0)

    for step in range(30):
        for p, gradient in zip(both[0], gradients(step, torch.float32), strict=True):
            p.grad = gradient
        optimizers[0].step()
        if step % 5 == 2:
            before = copy.deepcopy((both[1], optimizers[1].state_dict(), rules[1].state_dict()["state"]))
            scaled_step(step, math.inf)
            assert same(before[1], optimizers[1].state_dict()) and same(before[2], rules[1].state_dict()["state"])
            assert all(torch.equal(p, q) for p, q in zip(both[1], before[0], strict=True))
        scaled_step(step, 64.0)
        for key, value in rules[0].read_telemetry().items():
            assert rules[1].read_telemetry()[key] == pytest.approx(value, rel=1e-4), (step, key)
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_step_that_a_strategy_skips_changes_nothing():
    for fused in (False, True):
        parameters, rule, skip = tensors(), StableAdamW(), SkipStep(sigma=3.0, window=8)
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=fused)
        rule.attach(optimizer)
        skip.attach(optimizer)
        for step in range(24):
            for p, gradient in zip(parameters, gradients(1), strict=True):
                p.grad = gradient * (1 + 0.01 * (step % 3)) * (1e3 if step == 20 else 1)
            before = copy.deepcopy(parameters)
            optimizer.step()
            assert bool(skip.telemetry["skipped"]) == (step == 20)
            if step == 20:
                assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
                assert math.isnan(rule.read_telemetry()["update_rms"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_are_not_finite_change_no_other_tensor(value, fused):
    parameters, expected = tensors(), tensors()
    optimizers = [torch.optim.AdamW([{"params": [p]} for p in ps], lr=LR, fused=fused) for ps in (parameters, expected)]
    rules = [StableAdamW() for _ in range(2)]
    for rule, optimizer in zip(rules, optimizers, strict=True):
        rule.attach(optimizer)
    for step in range(7):
        for p, q, gradient in zip(parameters, expected, gradients(step), strict=True):
            p.grad, q.grad = gradient, gradient.clone()
        if step == 6:
            parameters[0].grad[1, 1] = value
        for optimizer in optimizers:
            optimizer.step()
        telemetry = rules[0].read_telemetry()
        assert math.isnan(telemetry["update_rms"]) == (step == 6)
    assert not telemetry["update_clipped"] and rules[1].read_telemetry()["update_clipped"]
    for p, q in zip(parameters[1:], expected[1:], strict=True):
        assert torch.equal(p, q)
    assert parameters[0].isnan().any() and int(rules[0].counters["nonfinite"]) == 1


def test_schedulers_and_saved_states_never_see_the_groups_of_a_step():
    parameters = tensors()
    optimizer, rule, seen = torch.optim.AdamW(parameters, lr=LR), StableAdamW(), []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    rule.attach(optimizer)
    group, listed = optimizer.param_groups[0], optimizer.param_groups
    optimizer.register_step_post_hook(lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    for step in range(6):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = gradient
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups is listed and optimizer.param_groups[0] is group
        assert len(optimizer.state_dict()["param_groups"]) == 1
    assert seen == [[LR * 0.5**step] for step in range(6)]
    assert rule.read_telemetry()["update_clipped"]


class Raises(torch.optim.AdamW):
    """Its step raises on demand, after the hooks."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            raise ZeroDivisionError
        return super().step(closure)


def before_a_step_that_raises() -> tuple[Raises, StableAdamW]:
    """Return an optimizer after five steps with a rule, whose next step scales a tensor, and raises."""
    parameters = tensors()
    optimizer, rule = Raises(parameters, lr=LR), StableAdamW()
    rule.attach(optimizer)
    for step in range(6):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = gradient
        if step < 5:
            optimizer.step()
    optimizer.broken = True
    return optimizer, rule


def test_state_can_be_loaded_and_a_group_added_after_a_step_that_raised():
    (optimizer, _), extra = before_a_step_that_raises(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.load_state_dict(saved)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.add_param_group({"params": [extra]})
    extra.grad, optimizer.broken = torch.ones_like(extra), False
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(SHAPES), 1]
    assert (extra < 1).all()


def test_groups_are_restored_as_soon_as_a_step_raises():
    optimizer, rule = before_a_step_that_raises()
    listed = optimizer.param_groups
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups is listed and len(optimizer.state_dict()["param_groups"]) == 1
    optimizer.broken = False
    optimizer.step()
    assert optimizer.param_groups is listed
    rule.detach()
    assert optimizer.param_groups is listed


def test_run_that_is_saved_and_loaded_continues_bit_for_bit():
    parameters = tensors(torch.float32)
    optimizer, rule = torch.optim.AdamW(parameters, lr=LR, fused=True), StableAdamW()
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
    optimizer, resumed = torch.optim.AdamW(loaded, lr=LR, fused=True), StableAdamW()
    optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(rule_state)
    resumed.attach(optimizer)
    for step in range(20, STEPS):
        for p, gradient in zip(loaded, gradients(step, torch.float32), strict=True):
            p.grad = gradient
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, loaded, strict=True))
    assert same(rule.state_dict(), resumed.state_dict()) and rule.read_telemetry() == resumed.read_telemetry()


@pytest.mark.parametrize("bucket", [1, 7])
def test_rms_does_not_depend_on_the_size_of_buckets(bucket, monkeypatch):
    parameters = tensors()
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    for step in range(7):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = gradient
        whole = update_rms(optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(zclip.updates.pieces, "BUCKET", bucket)
            torch.testing.assert_close(update_rms(optimizer), whole, rtol=1e-12, atol=0.0)
        optimizer.step()
    assert whole.shape == (4,) and whole.dtype == torch.float64


def test_tensors_without_elements_or_gradients_have_an_rms_of_zero():
    parameters, rule = [*tensors(), nn.Parameter(torch.zeros(0, 3))], StableAdamW()
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    rule.attach(optimizer)
    assert update_rms(optimizer).tolist() == [0.0] * 5
    optimizer.step()
    assert math.isnan(rule.read_telemetry()["update_rms"]) and int(rule.counters["nonfinite"]) == 0
    parameters[4].grad = torch.zeros(0, 3)
    parameters[1].grad = torch.ones(9, dtype=torch.float64)
    assert update_rms(optimizer).tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0, 0.0])


def test_parameters_that_can_have_no_gradient_keep_their_place():
    weights = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    parameters, rule = tensors(), StableAdamW()
    optimizer = torch.optim.AdamW([weights, *parameters], lr=LR)
    rule.attach(optimizer)
    for step in range(7):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = gradient
        optimizer.step()
    assert rule.read_telemetry()["update_clipped"] and torch.equal(weights, torch.ones(2, dtype=torch.int8))
    alone = torch.optim.AdamW(parameters, lr=LR)
    alone.state.update({p: optimizer.state[p] for p in parameters})
    assert torch.equal(update_rms(optimizer), torch.cat([torch.zeros(1), update_rms(alone)]))


def test_other_optimizers_and_a_second_rule_are_refused():
    parameters = tensors()
    with pytest.raises(TypeError, match=r"^SGD has no second moment: Adam and AdamW of torch are supported$"):
        StableAdamW().attach(torch.optim.SGD(parameters, lr=LR))
    with pytest.raises(TypeError, match=r"^the update of RMSprop is not known .*: Adam and AdamW of torch are suppor"):
        update_rms(torch.optim.RMSprop(parameters))
    optimizer = torch.optim.AdamW(parameters)
    UpdateClip().attach(optimizer)
    with pytest.raises(ValueError, match=r"^a rule over updates is attached to this optimizer already: detach\(\)"):
        StableAdamW().attach(optimizer)
