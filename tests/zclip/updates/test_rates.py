"""The rate of a step is scaled, and nobody but the step sees it: schedulers, saved states, hooks and groups."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.zclip.reference_loop import assert_same_weights, build_model
from tests.zclip.updates.rules import LR, Half, backward
from zclip.updates import UpdateBrake, UpdateClip, UpdateMonitor


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
