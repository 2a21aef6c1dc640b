"""The candidate that skips large outliers of the log norm."""

import math

import pytest
import torch

from experiments.labs.declaration import SKIPPING
from experiments.labs.skipping_log_z_score import SkippingLogZScore
from tests.helpers import compose_config
from training.config.strategy import clipping_strategy
from zclip import LogZScore


def norms(*outliers: float, many: int = 60) -> list[float]:
    """Return norms around 1 with a log deviation of about 0.1, and then others."""
    return [math.exp(0.1 * math.sin(7.0 * step)) for step in range(many)] + list(outliers)


def observed(rule: LogZScore, values: list[float]) -> list[float]:
    return [float(rule.observe(torch.tensor(value))) for value in values]


def test_small_outliers_are_clipped_and_large_ones_skipped():
    """1.4 is 4 to 5 deviations of 0.07 above the mean of the logs, and 8 is about 30."""
    rule = SkippingLogZScore()
    *calm, clipped, skipped = observed(rule, norms(1.4, 8.0))
    assert all(coefficient == 1 for coefficient in calm[10:])
    assert 0.5 < clipped < 1 and skipped == 0


def test_it_is_log_z_score_but_for_the_skipped_steps():
    values = norms(1.4, 8.0, 8.0, 1.0, 1.3, 0.2, 20.0)
    rule, other = SkippingLogZScore(), LogZScore()
    for value, coefficient in zip(values, observed(other, values), strict=True):
        own = float(rule.observe(torch.tensor(value)))
        z = rule.read_telemetry()["z"]
        assert own == (0 if z > 5 else coefficient), value
    both = [each.read_telemetry() for each in (rule, other)]
    assert all(both[0][key] == both[1][key] for key in ("z", "mean", "std"))


def test_outliers_do_not_hide_the_next_ones():
    *_, first, second, third, _, last = observed(SkippingLogZScore(), norms(8.0, 8.0, 8.0, 1.0, 8.0))
    assert first == second == third == last == 0


def test_a_lasting_rise_is_not_skipped_for_good():
    rule = SkippingLogZScore()
    assert observed(rule, norms(*[100.0] * 60))[-20:] == pytest.approx([1.0] * 20)


def test_an_optimizer_keeps_its_parameters_where_the_step_is_skipped():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rule = SkippingLogZScore()
    for value in norms(many=40):
        model.weight.grad = torch.full_like(model.weight, value / math.sqrt(2))
        rule.step(model, optimizer=optimizer)
        optimizer.step()
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(model.weight, 9.0)
    rule.step(model, optimizer=optimizer)
    optimizer.step()
    assert torch.equal(model.weight, before) and rule.read_telemetry()["skipped"] == 1


def test_arm_is_this_class_with_the_settings_of_log_z_score():
    config = compose_config("experiment=bad_data", *SKIPPING.overrides)
    rule = clipping_strategy(config.clip)
    assert type(rule) is SkippingLogZScore and (rule.skip_thresh, rule.z_thresh, rule.warmup_steps) == (5.0, 3.0, 10)
    assert config.update.name == "brake"
