"""The rate of a step is scaled, and nobody but the step sees it: schedulers, saved states, hooks and groups."""

import copy
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.data import DataLoader

from tests.zclip.reference_loop import assert_same_weights, build_model
from tests.zclip.updates.rules import LR, Half, backward
from zclip.apply import optimizer_parameters
from zclip.updates import OptimizerRule, UpdateBrake, UpdateClip, UpdateMonitor


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
    """Its step raises on demand, after the hooks, or calls something before."""

    broken: type[BaseException] | None = None
    within: Callable[[], object] | None = None

    def step(self, closure=None):
        loss = None if closure is None else closure()
        if self.within is not None:
            self.within()
        if self.broken:
            raise self.broken
        super().step()
        return loss


class HalfOfEach(OptimizerRule):
    """Half the rate of each tensor, so that the groups are split."""

    def before_step(self, optimizer, process_group):
        return torch.tensor([0.5 if i % 2 else 0.25 for i, _ in enumerate(optimizer_parameters(optimizer))])


RULES = pytest.mark.parametrize("make_rule", [Half, HalfOfEach])


def fail(optimizer: Raises, call: Callable[[], object], error: type[BaseException] = ZeroDivisionError) -> None:
    """Let a step raise."""
    optimizer.broken = error
    with pytest.raises(error):
        call()
    optimizer.broken = None


@RULES
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("scheduled", ["before", "after", "not at all"])
def test_step_that_raises_leaves_rates_and_groups(make_rule, error, scheduled):
    model, rule = build_model(), make_rule()
    optimizer = Raises(model.parameters(), lr=LR)
    if scheduled == "before":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    rule.attach(optimizer)
    if scheduled == "after":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    groups = optimizer.param_groups
    backward(model, 0)
    fail(optimizer, optimizer.step, error)
    assert optimizer.param_groups is groups
    assert groups[0]["lr"] == LR
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == LR
    rule.detach()
    fail(optimizer, optimizer.step, error)


@RULES
def test_schedulers_that_step_after_a_step_that_raised_never_see_the_scale(make_rule):
    """Those that multiply the rate, or are made then, would keep the scale for good."""
    seen = {}
    for attached in (False, True):
        model = build_model()
        optimizer = Raises(model.parameters(), lr=LR)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        if attached:
            make_rule().attach(optimizer)
        rates = seen[attached] = []
        for step in range(6):
            backward(model, step)
            if step == 2:
                fail(optimizer, optimizer.step)
                schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
            else:
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
                rates.append((scheduler.get_last_lr(), optimizer.state_dict()["param_groups"][0]["lr"]))
    assert seen[True] == seen[False]


@RULES
def test_scheduler_of_lightning_never_sees_the_scale_of_a_step_that_raised(make_rule, tmp_path):
    class Module(pl.LightningModule):
        def __init__(self, rule: OptimizerRule | None) -> None:
            super().__init__()
            self.net, self.rule, self.rates = build_model(), rule, []

        def configure_optimizers(self):
            optimizer = Raises(self.net.parameters(), lr=LR)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_train_start(self):
            if self.rule is not None:
                self.rule.attach(self.optimizers())

        def training_step(self, x, step):
            return self.net(x).square().mean()

        def optimizer_step(self, epoch, step, optimizer, closure):
            call = partial(super().optimizer_step, epoch, step, optimizer, closure)
            fail(optimizer.optimizer, call) if step == 2 else call()

        def on_train_batch_end(self, *_):
            self.rates.append(self.optimizers().param_groups[0]["lr"])

    rates = []
    for rule in (None, make_rule()):
        module = Module(rule)
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader([torch.ones(5)] * 5, batch_size=None))
        rates.append(module.rates)
    assert rates[0] == rates[1] and len(rates[0]) == 5


def test_step_that_raised_is_taken_at_the_scaled_rate_when_it_is_repeated():
    model = build_model()
    optimizer = Raises(model.parameters(), lr=LR)
    Half().attach(optimizer)
    backward(model, 0)
    fail(optimizer, optimizer.step)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(q - p, 0.5 * LR * p.grad)


@pytest.mark.parametrize("then", ["step", "save", "detach", "schedule"])
def test_rates_are_restored_as_soon_as_possible_if_a_program_replaces_the_step(then):
    """As Accelerate does in fp16."""
    model, rule = build_model(), Half()
    optimizer = Raises(model.parameters(), lr=LR)
    original = optimizer.step
    rule.attach(optimizer)
    optimizer.step = original
    backward(model, 0)
    fail(optimizer, optimizer.step)
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
        optimizer.param_groups[0]["lr"] = 0.7  # of a scheduler that knows its rate: it stays
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.7
        return
    assert optimizer.param_groups[0]["lr"] == LR


@RULES
def test_detached_rule_gives_the_step_back(make_rule):
    optimizer, rule = Raises(build_model().parameters(), lr=LR), make_rule()
    for _ in range(2):
        rule.attach(optimizer)
        rule.detach()
    assert "step" not in vars(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    of_scheduler = optimizer.step
    rule.attach(optimizer)
    rule.detach()
    assert optimizer.step is of_scheduler


@pytest.mark.filterwarnings("error")
def test_scheduler_that_was_made_first_does_not_warn_of_a_replaced_step():
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    Half().attach(optimizer)
    backward(model, 0)
    optimizer.step()
    scheduler.step()


@RULES
def test_state_that_is_saved_within_a_step_has_the_rates_and_groups(make_rule):
    """As by the handler of a signal."""
    model = build_model()
    optimizer, saved = Raises(model.parameters(), lr=LR), []
    make_rule().attach(optimizer)
    optimizer.within = lambda: saved.append(optimizer.state_dict()["param_groups"])
    backward(model, 0)
    optimizer.step()
    ((group,),) = saved
    assert group["lr"] == LR and len(group["params"]) == 4


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
