"""What happens in inference mode can go on outside of it: statistics are no inference tensors."""

import copy

import pytest
import torch

from tests.helpers import same
from tests.zclip.every_strategy import OF_NORMS, SHORT
from tests.zclip.reference_loop import batch, build_model
from zclip import AdaGC, AutoClip, ClippingStrategy
from zclip.updates import UpdateBrake, UpdateClip

RULES = OF_NORMS | {"update-clip": lambda: UpdateClip(window=4), "brake": lambda: UpdateBrake(warmup_steps=2)}
EACH = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


def observe(rule, steps: range) -> None:
    for t in steps:
        rule.observe(torch.tensor(1.0 + t % 4))


def assert_usable(rule) -> None:
    assert not any(value.is_inference() for value in [*rule.state.values(), *rule.counters.values()])


@EACH
def test_norms_that_are_observed_in_inference_mode_count_as_others_do(make):
    rule, expected = make(), make()
    observe(expected, range(12))
    with torch.inference_mode():
        observe(rule, range(3))
        norm = torch.tensor(1.0 + 3 % 4, dtype=torch.float64)
        assert norm.is_inference()
    assert_usable(rule)
    rule.observe(norm)
    observe(rule, range(4, 8))
    with torch.inference_mode():
        observe(rule, range(8, 10))
        rule.read_telemetry()
    observe(rule, range(10, 12))
    assert_usable(rule)
    assert same(rule.state_dict(), expected.state_dict())


@EACH
def test_state_that_is_made_in_inference_mode_can_be_changed_later(make):
    expected = make()
    observe(expected, range(6))
    with torch.inference_mode():
        fresh, loaded, copied = make(), make(), copy.deepcopy(expected)
        fresh.state_dict()
        loaded.load_state_dict(expected.state_dict())
    assert_usable(fresh)
    assert_usable(loaded)
    for rule, first in ((fresh, 0), (loaded, 6), (copied, 6)):
        observe(rule, range(first, 9))
    observe(expected, range(6, 9))
    assert all(same(rule.state_dict(), expected.state_dict()) for rule in (fresh, loaded, copied))


def test_history_that_grows_in_inference_mode_can_be_changed_later():
    strategy = AutoClip()
    observe(strategy, range(1023))
    with torch.inference_mode():
        observe(strategy, range(1023, 1026))
    observe(strategy, range(1026, 1027))
    assert_usable(strategy)
    assert len(strategy.state["history"]) == 2048 and strategy.state["count"] == 1027


def step(strategy: ClippingStrategy, model: torch.nn.Module, t: int) -> None:
    model.zero_grad()
    with torch.inference_mode(False):
        model(batch(t)).square().mean().backward()
    strategy.step(model)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_step_in_inference_mode_counts_as_others_do(make):
    strategy, expected, models = make(), make(), (build_model(), build_model())
    with torch.inference_mode():
        step(strategy, models[0], 0)
    step(expected, models[1], 0)
    for t in range(1, 4):
        step(strategy, models[0], t)
        step(expected, models[1], t)
    assert same(strategy.state_dict(), expected.state_dict())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_statistics_that_follow_their_tensors_in_inference_mode_can_be_changed_later():
    strategy, model = AdaGC(warmup_steps=2), build_model()
    step(strategy, model, 0)
    strategy._objects = []  # as after a restart
    model.append(torch.nn.Linear(3, 1))
    with torch.inference_mode():
        step(strategy, model, 1)
    assert_usable(strategy)
    step(strategy, model, 2)
    assert strategy.state["count"] == 3 and strategy.state["gamma"].isfinite().all()
