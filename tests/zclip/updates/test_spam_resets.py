"""SPAM's resets of the moments, and the warm-ups after them, are those of its equations, also after a resume."""

import copy
import io
import math

import pytest
import torch

from tests.helpers import same
from tests.zclip.updates.test_spam import LR, SPAMEquations, gradients, tensors
from zclip import ZClip
from zclip.updates import SPAM

EVERY, WARMUP, STEPS = 7, 4, 30
GROUPS = ({"lr": LR, "betas": (0.9, 0.999)}, {"lr": 0.3, "betas": (0.8, 0.95), "weight_decay": 0.1})


class ResetEquations(SPAMEquations):
    """The whole of Algorithm 1, but for sparse momentum, in float64; the bias correction goes on over resets."""

    def __init__(self, weights, **options) -> None:
        super().__init__(weights, **options)
        self.full_rate = self.lr

    def step(self, gradient) -> None:
        coming = self.t + 1
        since = coming % EVERY
        if since == 0:
            self.m, self.v = [0.0] * len(self.w), [0.0] * len(self.w)
        annealed = 0.99 * (1 + math.cos(math.pi * since / (WARMUP + 1))) / 2
        self.scale = 1 - annealed if coming >= EVERY and since < WARMUP else 1.0
        self.lr = self.scale * self.full_rate
        super().step(gradient)


def rule(theta: float = 5000.0) -> SPAM:
    return SPAM(theta, reset_every=EVERY, reset_warmup_steps=WARMUP)


def set_gradients(parameters, step: int, factor: float = 1.0, dtype=torch.float32) -> None:
    for p, gradient in zip(parameters, gradients(step, dtype), strict=True):
        p.grad = factor * gradient


class LateCount:
    """What a host knows of an accelerator's counter: nothing for two steps, then a value that is three steps old."""

    def __init__(self) -> None:
        self.known, self.age, self.seen = None, 0, []

    def read(self, counter: torch.Tensor) -> int | None:
        self.seen.append(int(counter))
        self.known, self.age = (None, len(self.seen)) if len(self.seen) < 4 else (self.seen[-4], 3)
        return self.known


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_of_two_groups_are_those_of_the_equations(options, late):
    parameters, spam = tensors(), rule()
    if late:
        spam._host_count = LateCount()
    groups = [{"params": parameters[i::2], **group} for i, group in enumerate(GROUPS)]
    equations = [ResetEquations(p.detach().numpy(), **GROUPS[i % 2]) for i, p in enumerate(parameters)]
    optimizer, clipped = torch.optim.AdamW(groups, **options), 0
    spam.attach(optimizer)
    for step in range(STEPS):
        set_gradients(parameters, step, dtype=torch.float64)
        for p, equation in zip(parameters, equations, strict=True):
            equation.step(p.grad)
        optimizer.step()
        for p, equation in zip(parameters, equations, strict=True):
            torch.testing.assert_close(p.detach(), equation.weights, rtol=1e-9, atol=1e-12)
        assert spam.read_telemetry()["update_scale"] == pytest.approx(equations[0].scale)
        clipped += sum(e.clipped for e in equations)
    assert clipped > 0 and [group["lr"] for group in optimizer.param_groups] == [LR, 0.3]
    assert int(spam.state["count"]) == STEPS


def test_reset_clears_the_maximum_of_amsgrad():
    parameters, spam = tensors(), rule()
    optimizer = torch.optim.AdamW(parameters, lr=LR, amsgrad=True)
    spam.attach(optimizer)
    for step in range(EVERY):
        set_gradients(parameters, step, 100.0 if step == 2 else 1.0, dtype=torch.float64)
        optimizer.step()
    for p in parameters:
        state = optimizer.state[p]
        assert float(state["step"]) == EVERY
        torch.testing.assert_close(state["exp_avg"], 0.1 * p.grad)
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(state[name], 0.001 * p.grad**2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by", ["GradScaler", "strategy", "no gradients"])
def test_skipped_steps_do_not_count(fused, by):
    runs = [tensors(torch.float32) for _ in range(2)]
    rules = [rule(), rule()]
    for skips, parameters, spam in zip((False, True), runs, rules, strict=True):
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=fused)
        spam.attach(optimizer)
        if by == "strategy":
            ZClip(warmup_steps=1000).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6, enabled=by == "GradScaler")
        for step in range(STEPS):
            # Before, at and after resets, and twice.
            for _ in range((step + 1) % EVERY in (0, 1, EVERY - 1) and skips and 1 + step % 2):
                set_gradients(parameters, step, math.nan)
                if by == "no gradients":
                    optimizer.zero_grad()
                scaler.scale(torch.ones(()))
                scaler.step(optimizer)
                scaler.update(64.0 if by == "GradScaler" else None)
                if fused or by != "GradScaler":  # which does not call the other optimizers then
                    assert math.isnan(spam.read_telemetry()["update_scale"])
                    assert int(spam.state["count"]) == step
            set_gradients(parameters, step, 64.0 if by == "GradScaler" else 1.0)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert same(rules[0].state, rules[1].state)


@pytest.mark.parametrize("at", [EVERY - 2, EVERY - 1, EVERY, EVERY + 2])
def test_resumed_run_continues_bit_for_bit(at):
    parameters, spam = tensors(torch.float32), rule(50.0)
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    spam.attach(optimizer)
    for step in range(STEPS):
        if step == at:
            file = io.BytesIO()
            torch.save((parameters, optimizer.state_dict(), spam.state_dict()), file)
        set_gradients(parameters, step)
        optimizer.step()
    file.seek(0)
    loaded, optimizer_state, rule_state = torch.load(file, weights_only=True)
    optimizer, resumed = torch.optim.AdamW(loaded, lr=LR, fused=True), rule(50.0)
    optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(rule_state)
    resumed.attach(optimizer)
    for step in range(at, STEPS):
        set_gradients(loaded, step)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, loaded, strict=True))
    assert same(spam.state_dict(), resumed.state_dict()) and same(
        resumed.state_dict(), copy.deepcopy(spam).state_dict()
    )


def test_states_from_before_there_were_resets_load_where_there_are_none():
    spam = SPAM(50.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    spam.attach(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    old = spam.state_dict()
    assert old["state"] == {"count": 1} and "update_scale" not in spam.read_telemetry()
    old["config"], old["state"] = {"theta": 50.0}, {}
    resumed = SPAM(50.0)
    resumed.load_state_dict(old)
    assert resumed.state == {"count": 0}
    with pytest.raises(ValueError, match=r"made with reset_every=None, not 7, reset_warmup_steps=150, not 4"):
        rule(50.0).load_state_dict(old)
    with pytest.raises(ValueError, match=r"made with theta=50\.0, not 5000\.0: make this one"):
        SPAM().load_state_dict(old)


def test_resets_can_be_switched_on_and_off_in_a_running_loop():
    runs = []
    for first in (rule(50.0), SPAM(50.0)):
        parameters = tensors()
        optimizer = torch.optim.AdamW(parameters, lr=LR)
        first.attach(optimizer)
        for step in range(STEPS):
            if step == EVERY - 2 and first.reset_every is None:
                first.change(reset_every=EVERY, reset_warmup_steps=WARMUP)
                assert len(first.changes) == 2
            set_gradients(parameters, step, dtype=torch.float64)
            optimizer.step()
        runs.append(parameters)
        first.change(reset_every=None)
        set_gradients(parameters, STEPS, dtype=torch.float64)
        optimizer.step()
        assert "update_scale" not in first.read_telemetry()
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


class Renamed(torch.optim.AdamW):
    """Its moments have other names."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["first_moment"], state["second_moment"] = state.pop("exp_avg"), state.pop("exp_avg_sq")


def test_mistakes_are_one_sentence():
    for arguments, words in (
        ({"reset_every": 1}, r"reset_every=1 is not allowed: it must be an integer from 2, or null for no resets"),
        ({"reset_every": 2.5}, r"reset_every=2\.5 is not allowed: it must be an integer from 2, or null for no resets"),
        ({"reset_warmup_steps": 0}, r"reset_warmup_steps=0 is not allowed: it must be an integer from 1"),
        ({"reset_every": 150}, r"reset_warmup_steps=150 is not allowed: it must be below reset_every=150"),
    ):
        with pytest.raises(ValueError, match=rf"^{words}$"):
            SPAM(**arguments)
    parameters = tensors()
    optimizer = Renamed(parameters)
    rule().attach(optimizer)
    set_gradients(parameters, 0, dtype=torch.float64)
    optimizer.step()
    words = "the moments of Renamed cannot be reset: its state has no exp_avg and no exp_avg_sq"
    with pytest.raises(TypeError, match=rf"^{words}$"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"^SGD has no second moment: Adam and AdamW of torch are supported$"):
        rule().attach(torch.optim.SGD(tensors()))
