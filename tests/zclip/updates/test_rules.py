"""Rules over updates scale the steps that torch's optimizers take, as their equations say, and nothing else."""

import copy
import gc
import io
import itertools
import math
import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.helpers import SLOW, same
from tests.zclip.reference_loop import assert_same_weights, build_model
from tests.zclip.transcriptions import UpdateBrakeEquations, UpdateClipEquations
from zclip import FixedNorm, SkipStep, ZClip
from zclip.updates import UpdateBrake, UpdateClip, UpdateDecision, UpdateMonitor, UpdateRule

LR, DECAY = 0.02, 0.1
SHORT_BRAKE = {"margin": 1.1, "release": 0.9, "sigmas": 0.3, "rise_steps": 100, "fall_steps": 3, "warmup_steps": 5}
RULES = {
    "clip": (lambda: UpdateClip(sigmas=0.5, window=8), lambda: UpdateClipEquations(sigmas=0.5, window=8)),
    "brake": (lambda: UpdateBrake(**SHORT_BRAKE), lambda: UpdateBrakeEquations(**SHORT_BRAKE)),
}
OPTIMIZERS = {
    "adamw": lambda p, lr=LR: torch.optim.AdamW(p, lr=lr, weight_decay=DECAY),
    "fused": lambda p, lr=LR: torch.optim.AdamW(p, lr=lr, weight_decay=DECAY, fused=True),
    "sgd": lambda p, lr=LR: torch.optim.SGD(p, lr=lr, momentum=0.9),
}
STEPS = 40


def batch(step: int) -> torch.Tensor:
    """(8, 5) inputs, which grow in steps 20 to 25."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return x * (30.0 if 20 <= step < 26 else 1.0)


def backward(model: nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    for p in model.parameters():
        p.grad = None
    loss = model(batch(step)).square().mean()
    (scale * loss).backward()
    return loss.detach()


def norm_of_the_next_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the norm of the update of a copy of the optimizer, at a rate of 1 and without decoupled decay."""
    gradients = [p.grad.clone() for p in model.parameters()]
    model, optimizer = copy.deepcopy((model, optimizer))  # without the gradients
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    before = [p.detach().double().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
        group["weight_decay"] = 0.0
    optimizer.step()
    return math.hypot(
        *(float((p.detach().double() - q).norm()) for p, q in zip(model.parameters(), before, strict=True))
    )


def train_by_hand(make_optimizer, equations, clip=None) -> tuple[nn.Module, list[float]]:
    """Take all steps at rates that are computed from the equations; return the model and the scales."""
    model = build_model()
    optimizer, scales = make_optimizer(model.parameters()), []
    for step in range(STEPS):
        backward(model, step)
        if clip is not None:
            clip.step(model)
        scales.append(equations.scale(norm_of_the_next_step(model, optimizer)))
        for group in optimizer.param_groups:
            group["lr"] = LR * scales[-1]
        optimizer.step()
    return model, scales


FLOWS = ("plain", "closure", "clip after", "clip before", "clip called", "tensor rate")


def case(rule: str, optimizer: str, flow: str):
    return (pytest.param if rule == "brake" and optimizer == "fused" else SLOW)(rule, optimizer, flow)


@pytest.mark.parametrize(
    ("name", "optimizer", "flow"), [case(*names) for names in itertools.product(RULES, OPTIMIZERS, FLOWS)]
)
def test_rule_takes_the_steps_of_its_equations(name, optimizer, flow):
    make_rule, make_equations = RULES[name]
    make_optimizer = OPTIMIZERS[optimizer]
    expected, scales = train_by_hand(
        make_optimizer, make_equations(), ZClip(warmup_steps=5) if "clip" in flow else None
    )
    assert min(scales) < 0.9 and max(scales) == 1.0
    model, rule, zclip = build_model(), make_rule(), ZClip(warmup_steps=5)
    rate = torch.tensor(LR) if flow == "tensor rate" else LR
    inner = make_optimizer(model.parameters(), rate)
    if flow == "clip before":
        zclip.attach(inner)
    rule.attach(inner)
    if flow == "clip after":
        zclip.attach(inner)
    for step in range(STEPS):
        if flow == "closure":
            inner.step(lambda step=step: backward(model, step))
        else:
            backward(model, step)
            if flow == "clip called":
                zclip.step(model, optimizer=inner)
            inner.step()
        assert rule.read_telemetry()["update_scale"] == pytest.approx(scales[step], rel=1e-4)
        assert all(group["lr"] is rate for group in inner.param_groups)
    assert_same_weights(model, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_steps_that_a_grad_scaler_skips_change_nothing(optimizer):
    rules = [RULES["brake"][0]() for _ in range(2)]
    models = [build_model() for _ in range(2)]
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    for rule, inner in zip(rules, optimizers, strict=True):
        rule.attach(inner)
    for step in range(STEPS):
        backward(models[0], step)
        optimizers[0].step()
        if step % 7 == 3:
            scaler.scale(backward(models[1], step, scale=math.nan))
            before = rules[1].state_dict()["state"]
            scaler.step(optimizers[1])
            scaler.update(1024.0)
            assert same(before, rules[1].state_dict()["state"])
        scaler.scale(backward(models[1], step, scale=1024.0))
        scaler.step(optimizers[1])
        scaler.update()
        for key, value in rules[0].read_telemetry().items():
            assert rules[1].read_telemetry()[key] == pytest.approx(value, rel=1e-5), (step, key)
    assert_same_weights(*models, rtol=1e-4, atol=1e-6)


def test_steps_that_a_strategy_skips_and_steps_without_gradients_change_nothing():
    for fused in (False, True):
        model, rule, zclip = build_model(), UpdateBrake(), ZClip()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        rule.attach(optimizer)
        zclip.attach(optimizer)
        for step in range(3):
            backward(model, step)
            optimizer.step()
        before, weights = rule.state_dict()["state"], copy.deepcopy(model)
        backward(model, 3, scale=math.nan)
        optimizer.step()
        assert zclip.read_telemetry()["nonfinite"] == 1
        for p in model.parameters():
            p.grad = None
        optimizer.step()
        assert same(before, rule.state_dict()["state"])
        assert math.isnan(rule.read_telemetry()["update_scale"])
        assert_same_weights(model, weights, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_a_strategy_skips_as_an_outlier_changes_nothing(fused):
    model, rule, skip = build_model(), UpdateClip(window=8), SkipStep(sigma=3.0, window=8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    rule.attach(optimizer)
    skip.attach(optimizer)
    skipped, counts = [], []
    for step in range(24):
        backward(model, step)
        optimizer.step()
        skipped.append(bool(skip.telemetry["skipped"]))
        counts.append(int(rule.state["count"]))
    assert skipped[20]
    assert counts == [sum(not skip for skip in skipped[: i + 1]) for i in range(24)]


def growing_norms(seed: int, steps: int) -> list[float]:
    """Log-normal norms that fall, with outliers, a run-up and a lasting rise, and a few that are no norms."""
    draw, norms = random.Random(seed), []
    for t in range(steps):
        level = (
            5.0 * math.exp(-t / 60) + (3.0 if t > 0.8 * steps else 1.0) + (0.02 * (t % 90 - 60) if t % 90 > 60 else 0)
        )
        norms.append(level * math.exp(draw.gauss(0, 0.1)) * (20.0 if t % 83 == 82 else 1.0))
    for t, value in ((7, math.nan), (70, math.inf), (71, 0.0), (120, math.nan)):
        norms[t] = value
    return norms


@pytest.mark.parametrize(
    ("make_rule", "make_equations", "steps"),
    [
        (*RULES["clip"], 200),
        (*RULES["brake"], 400),
        (UpdateClip, UpdateClipEquations, 300),
        (UpdateBrake, UpdateBrakeEquations, 400),
    ],
)
def test_decisions_are_those_of_the_transcription(make_rule, make_equations, steps):
    rule, equations, acted = make_rule(), make_equations(), 0
    for norm in growing_norms(1, steps):
        scale = float(rule.observe(torch.tensor(norm, dtype=torch.float64)))
        telemetry = rule.read_telemetry()
        if not (math.isfinite(norm) and norm > 0):
            assert scale == 1.0 and math.isnan(telemetry["update_scale"]) and not telemetry["update_clipped"]
            continue
        assert scale == pytest.approx(equations.scale(norm), rel=1e-9)
        assert telemetry["update_bound"] == pytest.approx(equations.bound, rel=1e-9)
        assert (telemetry["update_norm"], telemetry["update_clipped"]) == (norm, equations.clipped)
        acted += equations.clipped
    assert 0 < acted < steps


@settings(max_examples=20)
@given(st.lists(st.floats(1e-8, 1e8), min_size=30, max_size=60), st.sampled_from([*RULES]))
def test_scale_is_from_0_to_1_and_no_scaled_norm_is_above_its_bound(norms, name):
    rule = RULES[name][0]()
    for norm in norms:
        scale = float(rule.observe(torch.tensor(norm, dtype=torch.float64)))
        assert 0 < scale <= 1
        assert scale * norm <= rule.read_telemetry()["update_bound"] * (1 + 1e-9)


@pytest.mark.parametrize(("deviation", "sigmas", "expected"), [(0.1, 5, 1), (0.3, 5, 0.98), (0.3, 0, 0.49)])
def test_norms_that_vary_by_themselves_hold_the_scale_of_a_brake_only_without_sigmas(deviation, sigmas, expected):
    """The numbers of docs/reference/strategies.md."""
    rule, draw, scales = UpdateBrake(sigmas=sigmas), random.Random(0), []
    for _ in range(4000):
        norm = math.exp(draw.gauss(0.0, deviation))
        scales.append(float(rule.observe(torch.tensor(norm, dtype=torch.float64))))
    assert sum(scales[2000:]) / 2000 == pytest.approx(expected, abs=0.03)


def test_run_up_does_not_widen_the_bound():
    """The variance counts what is below the mean: norms that grow tenfold leave it as it is."""
    rule, draw = UpdateBrake(), random.Random(1)
    for _ in range(1000):
        rule.observe(torch.tensor(math.exp(draw.gauss(0.0, 0.1)), dtype=torch.float64))
    calm = rule.read_telemetry()["update_bound"]
    for step in range(40):
        rule.observe(torch.tensor(math.exp(step / 17), dtype=torch.float64))
    assert rule.read_telemetry()["update_bound"] == pytest.approx(calm, rel=0.03)
    assert rule.read_telemetry()["update_scale"] < 0.25


def test_norms_that_fall_steadily_do_not_widen_the_bound():
    """After the start of a run norms fall tenfold in 250 steps: the bound is near them from step 200 on."""
    rule, draw = UpdateBrake(), random.Random(2)
    for step in range(600):
        norm = 100 * 0.1 ** (min(step, 250) / 250) * math.exp(draw.gauss(0.0, 0.05))
        rule.observe(torch.tensor(norm, dtype=torch.float64))
        if step >= 200:
            assert 1.3 < rule.read_telemetry()["update_bound"] / norm < 4


@pytest.mark.parametrize(
    ("first", "steps", "highest"), [(500, 1, 2), (500, 10, 3), (500, 50, 4), (25, 3, 5), (70, 10, 5)]
)
def test_few_steps_almost_without_gradients_change_the_bound_little(first, steps, highest):
    """It is that low at once late in a run, and 100 steps later early in one."""
    rule, draw = UpdateBrake(), random.Random(3)
    for step in range(900):
        norm = 1e-6 if first <= step < first + steps else math.exp(draw.gauss(0.0, 0.05))
        rule.observe(torch.tensor(norm, dtype=torch.float64))
        if step >= 200:
            assert 1.1 < rule.read_telemetry()["update_bound"] < highest


def test_norms_that_have_fallen_for_good_are_followed():
    rule, draw = UpdateBrake(), random.Random(4)
    for step in range(2500):
        norm = (1.0 if step < 500 else 0.01) * math.exp(draw.gauss(0.0, 0.05))
        rule.observe(torch.tensor(norm, dtype=torch.float64))
    assert 1.3 < rule.read_telemetry()["update_bound"] / 0.01 < 2


@pytest.mark.parametrize("name", RULES)
def test_resumed_rule_continues_bit_for_bit(name):
    norms = [torch.tensor(norm, dtype=torch.float64) for norm in growing_norms(2, 160)]
    whole, first, second = (RULES[name][0]() for _ in range(3))
    scales = [whole.observe(norm) for norm in norms]
    for norm in norms[:75]:
        first.observe(norm)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert all(torch.equal(second.observe(norm), scale) for norm, scale in zip(norms[75:], scales[75:], strict=True))
    assert same(whole.state_dict(), second.state_dict())


def test_saved_states_that_are_damaged_or_of_other_rules_are_refused():
    rule = UpdateBrake(**SHORT_BRAKE)
    for norm in growing_norms(3, 130):
        rule.observe(torch.tensor(norm, dtype=torch.float64))
    saved = rule.state_dict()
    with pytest.raises(ValueError, match=r"^state of UpdateBrake \(version 1\) cannot be loaded into UpdateClip"):
        UpdateClip().load_state_dict(saved)
    with pytest.raises(ValueError, match=r"was made with .*release=0\.9, not 0\.999"):
        UpdateBrake().load_state_dict(saved)
    for key, value, words in (
        ("log_scale", 0.5, r"state\.log_scale=0\.5 is not allowed: it must be at most 0"),
        ("log_scale", math.nan, r"state\.log_scale"),
        ("count", 0, r"state\.level=.* finite after the first step, and -inf before"),
        ("level", math.nan, r"state\.level"),
        ("mean", math.nan, r"state\.mean=nan is not allowed: it must be a finite number"),
        ("variance", -1.0, r"state\.variance"),
    ):
        damaged = copy.deepcopy(saved)
        damaged["state"][key].fill_(value)
        with pytest.raises(ValueError, match=words):
            UpdateBrake(**SHORT_BRAKE).load_state_dict(damaged)


class Half(UpdateRule):
    """Always half the rate."""

    def decide(self, norm, state):
        return UpdateDecision(torch.full_like(norm, 0.5), norm > 0, norm * 0.5, {})


def test_scheduler_and_saved_states_never_see_the_scale():
    rates = {}
    for attached in (False, True):
        model, seen = build_model(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)  # from the rate before
        if attached:
            Half().attach(optimizer)
        for step in range(12):
            backward(model, step)
            optimizer.step()
            seen.append((optimizer.state_dict()["param_groups"][0]["lr"], *scheduler.get_last_lr()))
            scheduler.step()
        rates[attached] = seen
    assert rates[True] == rates[False]


@pytest.mark.parametrize("attach_first", [False, True])
def test_schedulers_in_hooks_after_the_step_never_see_the_scale(attach_first):
    model = build_model()
    optimizer, rule, seen = torch.optim.SGD(model.parameters(), lr=1.0), Half(), []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)  # from the rate before

    def hook(*_):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step()

    if attach_first:
        rule.attach(optimizer)
    optimizer.register_step_post_hook(hook)
    if not attach_first:
        rule.attach(optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert seen == [1.0, 0.5, 0.25]


def test_rate_that_a_hook_before_the_step_sets_is_scaled():
    model, rule = build_model(), Half()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=0.3))
    rule.attach(optimizer)
    for step in range(3):
        if step == 1:  # it comes before the rule from the next step on
            optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=0.1))
        backward(model, step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        if step != 1:
            for p, q in zip(model.parameters(), before, strict=True):
                torch.testing.assert_close(q - p, 0.5 * (0.1 if step else 0.3) * p.grad)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_rule_that_a_closure_detaches_does_not_act():
    model, rule = build_model(), Half()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rule.attach(optimizer)

    def closure():
        rule.detach()
        return backward(model, 0)

    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == LR and rule.read_telemetry() == {}


class Raises(torch.optim.SGD):
    """Its step raises on demand, after the hooks."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            raise ZeroDivisionError
        return super().step(closure)


@pytest.mark.parametrize("then", ["step", "save", "detach", "schedule"])
def test_rates_are_restored_after_a_step_that_raised(then):
    model, rule = build_model(), Half()
    optimizer = Raises(model.parameters(), lr=LR)
    rule.attach(optimizer)
    backward(model, 0)
    optimizer.broken = True
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.broken = False
    if then == "step":
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(q - p, 0.5 * LR * p.grad)
    elif then == "save":
        assert optimizer.state_dict()["param_groups"][0]["lr"] == LR
    elif then == "detach":
        rule.detach()
    else:
        optimizer.param_groups[0]["lr"] = 0.7  # of a scheduler: it stays
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.7
        return
    assert optimizer.param_groups[0]["lr"] == LR


def test_closure_that_raises_leaves_the_rate():
    optimizer, rule = torch.optim.SGD(build_model().parameters(), lr=LR), Half()
    rule.attach(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups[0]["lr"] is LR


def test_groups_keep_their_own_rates_and_decay_is_scaled():
    model = build_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)
    expected, other = copy.deepcopy((model, optimizer))
    Half().attach(optimizer)
    for group in other.param_groups:
        group["lr"] *= 0.5
    for step in range(3):
        for net, inner in ((model, optimizer), (expected, other)):
            backward(net, step)
            inner.step()
    assert_same_weights(model, expected, rtol=0, atol=0)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 0.5]


def test_monitor_and_a_scale_of_one_change_no_bit():
    models = [build_model() for _ in range(3)]
    for model, rule in zip(models, (None, UpdateMonitor(), UpdateClip()), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        if rule is not None:
            rule.attach(optimizer)
        for step in range(5):
            backward(model, step)
            optimizer.step()
    assert_same_weights(models[0], models[1], rtol=0, atol=0)
    assert_same_weights(models[0], models[2], rtol=0, atol=0)


def test_step_of_a_subclass_is_scaled_once():
    torch.optim.SGD(build_model().parameters())  # from now on torch calls the hooks in the base class's step too
    model, rule = build_model(), Half()
    optimizer = Raises(model.parameters(), lr=LR)
    rule.attach(optimizer)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(q - p, 0.5 * LR * p.grad)
    rule.detach()
    counted = UpdateClip()
    counted.attach(optimizer)
    optimizer.step()
    assert int(counted.state["count"]) == 1


def test_state_that_a_checkpoint_creates_is_no_step():
    model, rule = build_model(), UpdateBrake()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rule.attach(optimizer)
    assert get_optimizer_state_dict(model, optimizer)["state"] and rule.read_telemetry() == {}
    backward(model, 0)
    optimizer.step()
    assert int(rule.state["count"]) == 1


def test_rules_are_attached_once_and_detached():
    model, rule = build_model(), Half()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=LR) for _ in range(2))
    rule.attach(optimizer)
    with pytest.raises(ValueError, match=r"^this Half is attached already: detach\(\) it, or make one for each$"):
        rule.attach(other)
    with pytest.raises(ValueError, match=r"^a rule over updates is attached to this optimizer already: detach\(\)"):
        Half().attach(optimizer)
    with pytest.raises(TypeError, match=r"^the update of Muon is not known before its step: Adam, AdamW and SGD of"):
        Half().attach(torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]))
    rule.detach()
    rule.detach()
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(q - p, LR * p.grad)
    assert rule.read_telemetry() == {}
    Half().attach(optimizer)


def test_rule_lives_as_long_as_the_optimizer_and_copies_are_not_attached():
    model, rule = build_model(), UpdateBrake()
    model.optimizer = torch.optim.AdamW(model.parameters())  # as a LightningModule knows its own
    rule.attach(model.optimizer)
    FixedNorm(1.0).attach(model.optimizer)
    backward(model, 0)
    model.optimizer.step()
    copied = copy.deepcopy(rule)
    copied.attach(torch.optim.AdamW(build_model().parameters()))
    assert int(copied.state["count"]) == 1
    reference = weakref.ref(model)
    del model, rule
    gc.collect()
    assert reference() is None


class NoDecision(UpdateRule):
    def decide(self, norm, state):
        return torch.ones_like(norm)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 0.5), ("clipped", True), ("bound", 2.0), ("state", {"count": 1}), ("telemetry", {"m": 0})],
)
def test_decision_that_is_not_of_tensors_is_refused(name, value):
    class Numbers(Half):
        def decide(self, norm, state):
            return super().decide(norm, state)._replace(**{name: value})

    key, number = next(iter(value.items())) if isinstance(value, dict) else (name, value)
    with pytest.raises(TypeError, match=rf"^Numbers\.decide must return tensors: {key} is {number}$"):
        Numbers().observe(torch.tensor(1.0))


def test_mistakes_are_one_sentence():
    with pytest.raises(TypeError, match=r"^NoDecision\.decide must return an UpdateDecision, not Tensor$"):
        NoDecision().observe(torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match=r"^UpdateRule must implement decide\(norm, state\)$"):
        UpdateRule().observe(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^norm= takes a 0-dim real tensor, not float$"):
        UpdateClip().observe(1.0)


def test_repr_and_live_changes_are_those_of_strategies():
    rule = UpdateBrake(release=0.99)
    assert repr(rule).startswith("UpdateBrake(margin=1.6, release=0.99, sigmas=5.0, rise_steps=1000")
    rule.observe(torch.tensor(2.0))
    rule.change(release=0.5)
    assert rule.state_dict()["changes"] == [["release", 0.99, 0.5]]
    for arguments in (
        {"release": 1.0},
        {"margin": 1},
        {"margin": math.inf},
        {"margin": 10**400},
        {"sigmas": -1},
        {"rise_steps": 0},
        {"fall_steps": 0.5},
    ):
        (name,) = arguments
        with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed: it must be "):
            UpdateBrake(**arguments)
