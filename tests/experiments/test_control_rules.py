"""The labs' controls for the brake: the same rule over gradient norms, and a lower rate from one step on."""

import pytest
import torch

from experiments.labs.declaration import GRADIENT_BRAKES, LATER_RATES
from experiments.labs.gradient_brake import GradientBrake
from experiments.labs.later_rate import LaterRate
from tests.helpers import compose_config
from training.config.strategy import update_rule
from zclip.updates import UpdateBrake


def test_brake_on_gradient_norms_decides_as_the_brake_does_on_these_norms():
    """The gradients of step 60 have 50 times the norm, and the updates only a few times."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    rule, other = GradientBrake(), UpdateBrake()
    rule.attach(optimizer)
    scales, expected = [], []
    for step in range(80):
        for weight in weights:
            weight.grad = torch.randn_like(weight) * (50.0 if step == 60 else 1.0)
        norm = torch.linalg.vector_norm(torch.cat([w.grad.flatten() for w in weights]))
        expected.append(float(other.observe(norm)))
        optimizer.step()
        scales.append(rule.read_telemetry()["update_scale"])
        assert rule.read_telemetry()["update_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert scales == pytest.approx(expected, rel=1e-5) and scales[59] == 1.0 and scales[60] < 0.2


def test_later_rate_scales_all_steps_after_the_given_number():
    rule = LaterRate(after=3, scale=0.25)
    assert [float(rule.observe(torch.tensor(norm))) for norm in (1.0, 9.0, 1.0, 1.0, 0.1)] == [1, 1, 1, 0.25, 0.25]
    for arguments in ({"after": 0, "scale": 0.5}, {"after": 1, "scale": 0}, {"after": 1, "scale": 1.5}):
        with pytest.raises(ValueError, match="is not allowed"):
            LaterRate(**arguments)


@pytest.mark.parametrize("arm", [*LATER_RATES, *GRADIENT_BRAKES], ids=lambda arm: arm.label)
def test_arms_of_the_lab_compose(arm):
    rule = update_rule(compose_config("experiment=adam_lag", *arm.overrides).update)
    assert isinstance(rule, LaterRate) if "later" in arm.overrides[2] else isinstance(rule, GradientBrake)
