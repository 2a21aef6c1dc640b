"""Strategies and rules of one's own: what makes them impossible is one sentence before training."""

import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, RunError, UserError
from tests.helpers import compose_config
from training.config.own_rules import check_own_rules, exits_as_errors
from training.config.strategy import exit_name

CODE = """
import torch
from zclip import ClippingStrategy, Decision
from zclip.updates import OptimizerRule, UpdateDecision, UpdateRule


class Strategy(ClippingStrategy):
    def __init__(self, key: str = "mean", scope=None) -> None:
        super().__init__(scope=scope)
        self.key = key

    def decide(self, norm, state):
        if self.key == "fails":
            raise ValueError("two rows are too few")
        torch.rand(())
        return Decision(norm * 2, state, {self.key: norm})


class Rule(UpdateRule):
    def __init__(self, key: str = "mean") -> None:
        super().__init__()
        self.key = key

    def decide(self, norm, state):
        if self.key == "fails":
            raise ValueError("two rows are too few")
        return UpdateDecision(None, norm > 0, norm, state, {self.key: norm})


class OfSGD(Rule):
    optimizers = (torch.optim.SGD,)
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_classes.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


def check(section: str, name: str, *overrides: str) -> None:
    group = "clip=none" if section == "clip" else "update=monitor"
    check_own_rules(compose_config(group, f"{section}._target_=own_classes.{name}", f"{section}.name=own", *overrides))


@pytest.mark.parametrize(
    ("section", "name", "key"),
    [
        *(("clip", "Strategy", key) for key in ("grad_norm", "clipped_norm", "clipped", "nonfinite")),
        *(("update", "Rule", key) for key in ("update_norm", "update_scale", "update_clipped", "update_bound")),
    ],
)
def test_telemetry_with_the_name_of_a_number_of_the_library_is_refused_before_training(section, name, key):
    with pytest.raises(ConfigError) as error:
        check(section, name, f"+{section}.key={key}")
    assert str(error.value) == (
        f"{section}._target_=own_classes.{name} is not possible: telemetry of {name} must not have the name {key}, "
        "which every rule records"
    )


@pytest.mark.parametrize(
    ("section", "name", "keys"),
    [
        ("clip", "Strategy", ("step", "loss", "lr", "masked_rows", "clip_seconds", "update_mean")),
        ("update", "Rule", ("tokens", "mfu", "peak_memory_gib", "my_seconds", "grad_norm", "clipped")),
    ],
)
def test_telemetry_with_the_name_of_another_number_of_metrics_is_refused_before_training(section, name, keys):
    for key in keys:
        with pytest.raises(ConfigError) as error:
            check(section, name, f"+{section}.key={key}")
        assert str(error.value) == (
            f"{section}._target_=own_classes.{name} is not possible: telemetry of {name} must not have the name {key}: "
            "metrics.jsonl has another number of that name"
        )


def test_telemetry_of_a_strategy_and_a_rule_of_ones_own_must_not_share_a_name():
    both = ("clip=none", "clip._target_=own_classes.Strategy", "clip.name=own", "+clip.key=one")
    check("update", "Rule", "+update.key=other", *both)
    with pytest.raises(
        ConfigError, match=r"^update\._target_=own_classes\.Rule .* must not have the name one: metrics"
    ):
        check("update", "Rule", "+update.key=one", *both)


@pytest.mark.parametrize(("section", "name"), [("clip", "Strategy"), ("update", "Rule")])
def test_other_names_and_errors_of_own_code_are_left_for_training_and_a_scope_hides_no_name(section, name):
    state = torch.get_rng_state()
    for key in ("own_mean", "clipped_by_max" if section == "clip" else "update_mean", "fails"):
        check(section, name, f"+{section}.key={key}")
    if section == "clip":
        with pytest.raises(ConfigError, match="name clipped, which"):
            check(section, name, "+clip.key=clipped", "+clip.scope=[model.layers.*]")
    assert torch.equal(torch.get_rng_state(), state)


def test_rule_that_does_not_act_on_adamw_is_refused_before_training():
    with pytest.raises(ConfigError) as error:
        check("update", "OfSGD")
    assert str(error.value) == (
        "update._target_=own_classes.OfSGD is not possible: OfSGD does not act on AdamW: SGD of torch is supported"
    )


def test_train_py_refuses_before_it_writes(run_in_process, tiny, tmp_path):
    with pytest.raises(UserError, match=r"telemetry of Rule must not have the name update_norm, which every rule rec"):
        run_in_process(*tiny, "update=monitor", "update._target_=own_classes.Rule", "+update.key=update_norm")
    assert not (tmp_path / "runs").exists()


def test_error_while_attaching_is_left_for_training(tmp_path):
    attach = "def attach(self, optimizer):\n        raise OSError"
    code = f"from own_classes import Strategy\nclass Raises(Strategy):\n    {attach}\n"
    (tmp_path / "own_attach.py").write_text(code)
    check_own_rules(compose_config("clip=none", "clip._target_=own_attach.Raises", "clip.name=own"))


#: Classes that exit in one place of their code. `on_matrices`: the step exits only on the matrices of a run.
EXITS = """
import sys
import torch
from zclip import ClippingStrategy, Decision
from zclip.updates import UpdateDecision, UpdateRule


def leave(where, wanted, size=0):
    if where == wanted or (wanted == "on_matrices" and where == "step" and size > 10000):
        sys.exit(7)


class Strategy(ClippingStrategy):
    def __init__(self, where="none"):
        super().__init__()
        leave("init", where)
        self.where = where

    def attach(self, optimizer, *more, **options):
        leave("attach", self.where)
        super().attach(optimizer, *more, **options)

    def step(self, parameters, optimizer=None, loss=None):
        parameters = list(parameters)
        leave("step", self.where, sum(each.numel() for each in parameters))
        return super().step(parameters, optimizer=optimizer, loss=loss)

    def decide(self, norm, state):
        leave("decide", self.where)
        return Decision(norm * 2, state, {})


class Rule(UpdateRule):
    def __init__(self, where="none"):
        super().__init__()
        leave("init", where)
        self.where = where
        self.size = 0

    def attach(self, optimizer):
        leave("attach", self.where)
        self.size = sum(each.numel() for group in optimizer.param_groups for each in group["params"])
        super().attach(optimizer)

    def decide(self, norm, state):
        leave("step", self.where, self.size)
        return UpdateDecision(None, norm > 0, norm, state, {})


class Optimizer(torch.optim.SGD):
    def __init__(self, params, lr, where="none"):
        leave("init", where)
        super().__init__(params, lr=lr)
        self.where = where

    def step(self, closure=None):
        loss = super().step(closure)
        leave("step", self.where, sum(each.numel() for group in self.param_groups for each in group["params"]))
        return loss
"""

SECTIONS = {
    "clip": ("clip=none", "clip._target_=exits.Strategy", "clip.name=own"),
    "update": ("update=monitor", "update._target_=exits.Rule", "update.name=own"),
    "optim": ("optim=custom", "optim._target_=exits.Optimizer", "optim.name=own"),
}


@pytest.mark.parametrize(
    ("section", "place"),
    [
        *((section, "import") for section in SECTIONS),
        *((section, "init") for section in SECTIONS),
        ("update", "step"),
        ("optim", "step"),
        ("clip", "attach"),
        ("clip", "decide"),
        ("update", "attach"),
    ],
)
def test_class_that_exits_is_named_before_training(section, place, refusal, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits.py").write_text("raise SystemExit(7)" if place == "import" else EXITS)
    monkeypatch.delitem(sys.modules, "exits", raising=False)
    target = SECTIONS[section][1]
    settings = [setting for setting in tiny if not setting.startswith("clip.")]
    line = refusal(*settings, *SECTIONS[section], *([] if place == "import" else [f"+{section}.where={place}"]))
    assert line == f"train.py: error: {target} is not possible: its code raises SystemExit(7)"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("section", SECTIONS)
def test_class_that_exits_while_it_trains_ends_the_run_with_a_sentence(section, run_in_process, tiny, tmp_path):
    (tmp_path / "exits.py").write_text(EXITS)
    settings = [setting for setting in tiny if not setting.startswith("clip.")]
    own = (*SECTIONS[section], f"+{section}.where=on_matrices", "name=own")
    with pytest.raises(RunError) as error:
        run_in_process(*settings, *own)
    assert str(error.value) == f"{SECTIONS[section][1]} has ended the run: its code raises SystemExit(7)"
    failure = (tmp_path / "runs" / "main" / "own" / "failure.txt").read_text()
    assert failure == f"{error.value}\n"


def test_exit_of_other_code_is_none_of_a_class():
    with pytest.raises(SystemExit), exits_as_errors(compose_config()):
        sys.exit(3)


def test_exit_with_a_message_shows_its_beginning():
    assert exit_name(SystemExit("usage:\n  mine")) == "SystemExit('usage: mine')"
    assert exit_name(SystemExit()) == "SystemExit(None)"
