"""Rules over updates decide and scale the steps of torch's optimizers as their equations say, and nothing else."""

import copy
import gc
import io
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon

from tests.helpers import SLOW, same
from tests.zclip.reference_loop import assert_same_weights, build_model
from tests.zclip.transcriptions import UpdateBrakeEquations, UpdateClipEquations
from tests.zclip.updates.rules import LR, OPTIMIZERS, RULES, Half, backward, growing_norms
from zclip import FixedNorm, SkipStep, ZClip
from zclip.updates import UpdateBrake, UpdateClip, UpdateRule

STEPS = 40


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


@pytest.mark.parametrize(
    ("supported", "optimizer", "sentence"),
    [
        ((SGD,), AdamW, "Narrow does not act on AdamW: SGD of torch is supported"),
        ((SGD,), Adam, "Narrow does not act on Adam: SGD of torch is supported"),
        ((SGD,), Muon, "the update of Muon is not known before its step: SGD of torch is supported"),
        ((AdamW,), Adam, "Narrow does not act on Adam: AdamW of torch is supported"),
        ((AdamW,), SGD, "SGD has no second moment: AdamW of torch is supported"),
        ((AdamW, SGD), Adam, "Narrow does not act on Adam: AdamW and SGD of torch are supported"),
        ((Adam,), SGD, "SGD has no second moment: Adam and AdamW of torch are supported"),
        ((Muon, SGD), AdamW, "Narrow does not act on AdamW: Muon and SGD of torch are supported"),
    ],
)
def test_refusal_of_an_optimizer_names_those_that_the_rule_supports(supported, optimizer, sentence):
    class Narrow(Half):
        optimizers = supported

    parameters = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError) as error:
        Narrow().attach(optimizer(parameters))
    assert str(error.value) == sentence
    for each in supported:
        Narrow().attach(each(parameters))


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
    with pytest.raises(TypeError, match=r"^norm= takes a real number or a 0-dim real tensor, not str$"):
        UpdateClip().observe("1.0")
