"""The scales of a rule of one's own are above 0 and at most 1: any other is refused, and changes nothing."""

import math

import pytest
import torch
from torch import nn

from tests.helpers import same
from tests.zclip.reference_loop import assert_same_weights, build_model
from tests.zclip.updates.rules import LR, backward
from zclip.updates import OptimizerRule, UpdateBrake, UpdateDecision, UpdateRule

REFUSED = [math.nan, -0.5, 0.0, -math.inf, math.inf, 1.0000001, 2]
NORM = torch.tensor(2.0, dtype=torch.float64)


class Own(UpdateRule):
    """Scales of one's own, one a step, and a count."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.scales = scales

    def initial_state(self, like):
        return {"count": torch.zeros((), dtype=torch.int64)}

    def decide(self, norm, state):
        scale = torch.tensor(self.scales[int(state["count"])], dtype=norm.dtype)
        return UpdateDecision(scale, scale < 1, norm * scale, {"count": state["count"] + 1})


class OwnFactors(OptimizerRule):
    """A factor for all parameters, or one for each."""

    def __init__(self, factors: object) -> None:
        super().__init__()
        self.factors = factors

    def before_step(self, optimizer, process_group):
        return torch.tensor(self.factors) if isinstance(self.factors, float | int | list) else self.factors


def attached(rule: OptimizerRule, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **options)
    rule.attach(optimizer)
    return model, optimizer


@pytest.mark.parametrize("scale", REFUSED)
@pytest.mark.parametrize("fused", [False, True])
def test_scale_that_is_not_allowed_is_refused_before_the_step(scale, fused):
    rule = Own([0.5, 0.5, scale])
    model, optimizer = attached(rule, fused=fused)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    before, telemetry = rule.state_dict()["state"], rule.telemetry
    weights = [p.detach().clone() for p in model.parameters()]
    backward(model, 2)
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert str(error.value) == f"Own.decide must return scales above 0 and at most 1: one is {float(scale)}"
    assert same(before, rule.state_dict()["state"]) and rule.telemetry is telemetry
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert optimizer.param_groups[0]["lr"] is LR
    with pytest.raises(ValueError, match=r"^Own\.decide must return scales above 0 and at most 1"):
        rule.observe(NORM)


@pytest.mark.parametrize("scale", REFUSED)
@pytest.mark.parametrize("each", [False, True])
def test_factors_that_a_rule_over_tensors_returns_are_checked_too(scale, each):
    rule = OwnFactors([1.0, 0.5, float(scale), 1.0] if each else float(scale))
    model, optimizer = attached(rule)
    backward(model, 0)
    with pytest.raises(ValueError, match=r"^OwnFactors\.before_step must return scales above 0 and at most 1: one is "):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] is LR and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("scale", [1.0, 1, 0.5, 5e-324])
def test_scales_that_are_allowed_are_taken(scale):
    assert float(Own([scale]).observe(NORM)) == scale


@pytest.mark.parametrize(
    ("factors", "sentence"),
    [
        (0.5j, "OwnFactors.before_step must return a tensor or None, not complex"),
        (
            [0.5, 0.5, 0.5],
            "OwnFactors.before_step must return one scale, or one for each of the 4 parameters: "
            "it returned a tensor of shape [3]",
        ),
        (
            [[0.5]] * 4,
            "OwnFactors.before_step must return one scale, or one for each of the 4 parameters: "
            "it returned a tensor of shape [4, 1]",
        ),
    ],
)
def test_factors_of_another_kind_or_shape_are_refused(factors, sentence):
    model, optimizer = attached(OwnFactors(factors))
    backward(model, 0)
    with pytest.raises(TypeError) as error:
        optimizer.step()
    assert str(error.value) == sentence


@pytest.mark.parametrize("name", ["scale", "clipped", "bound"])
def test_decision_of_another_shape_is_refused(name):
    class Shaped(Own):
        def decide(self, norm, state):
            decision = super().decide(norm, state)
            return decision._replace(**{name: getattr(decision, name).reshape(1)})

    with pytest.raises(TypeError, match=rf"^Shaped\.decide must return 0-dim tensors: {name} has the shape \[1\]$"):
        Shaped([0.5]).observe(NORM)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [lambda: Own([0.5, 0.5]), lambda: OwnFactors(0.5)], ids=["decide", "before_step"])
def test_scales_of_steps_that_are_not_taken_may_be_any(make, fused):
    """In fp16 a GradScaler skips steps whose gradients are infinite, so a rule may divide by such a norm."""
    rules, models = [make(), make()], []
    for rule, with_skip in zip(rules, (False, True), strict=True):
        model, optimizer = attached(rule, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
        for step in range(2):
            if with_skip and step == 1:
                good = rule.__dict__.get("scales"), rule.__dict__.get("factors")
                rule.scales, rule.factors = [math.nan] * 2, math.nan
                scaler.scale(backward(model, step, scale=math.nan))
                scaler.step(optimizer)
                scaler.update(64.0)
                rule.scales, rule.factors = good
            scaler.scale(backward(model, step, scale=64.0))
            scaler.step(optimizer)
            scaler.update()
        models.append(model)
    assert_same_weights(*models, rtol=0, atol=0)


def test_scale_of_a_brake_is_above_0_for_any_two_norms(monkeypatch):
    """In float32, as on devices that have no float64, exp(bound - log norm) can be too small."""
    for module in ("zclip.state", "zclip.updates.base"):
        monkeypatch.setattr(f"{module}.statistics_dtype", lambda device: torch.float32)
    rule = UpdateBrake(warmup_steps=1)
    rule.observe(torch.tensor(1e-37))
    scale = rule.observe(torch.tensor(1e18))
    assert scale.dtype == torch.float32 and 0 < float(scale) < 1e-37
