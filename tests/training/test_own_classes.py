"""Strategies and rules of one's own: what makes them impossible is one sentence before training."""

from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, UserError
from tests.helpers import compose_config
from training.config.own_rules import check_own_rules

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


@pytest.mark.parametrize(("section", "name"), [("clip", "Strategy"), ("update", "Rule")])
def test_other_names_and_errors_of_own_code_are_left_for_training_and_a_scope_hides_no_name(section, name):
    state = torch.get_rng_state()
    for key in ("mean", "clipped_by_max" if section == "clip" else "grad_norm", "fails"):
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
