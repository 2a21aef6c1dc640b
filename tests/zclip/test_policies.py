"""What a strategy does on a norm that is not finite can be assigned, as the bound of a class that takes one can."""

import math

import pytest
import torch

from zclip import AGC, ClippingStrategy, Decision, FixedNorm, NoClipping, ZClip
from zclip.updates import UpdateBrake, UpdateClip


def running(strategy: ClippingStrategy) -> ClippingStrategy:
    strategy.observe(torch.tensor(1.0))
    return strategy


def test_assigned_policies_are_recorded_as_changes():
    strategy = ZClip(on_nonfinite="zero")
    strategy.max_consecutive_nonfinite = 5
    assert running(strategy).changes == [], "it has only begun"
    strategy.on_nonfinite = "skip"
    strategy.max_consecutive_nonfinite = 5
    strategy.max_consecutive_nonfinite = None
    strategy.observe(torch.tensor(math.nan))
    assert strategy.changes == [
        {"setting": "on_nonfinite", "from": "zero", "to": "skip"},
        {"setting": "max_consecutive_nonfinite", "from": 5, "to": None},
    ]
    assert strategy.read_telemetry()["changes"] == 2
    for name, value, allowed in (
        ("on_nonfinite", "ignore", "one of skip, zero, raise"),
        ("max_consecutive_nonfinite", 0, "an integer from 1, or null for no limit"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}={value} is not allowed: it must be {allowed}$"):
            setattr(strategy, name, value)
    assert strategy.on_nonfinite == "skip" and strategy.max_consecutive_nonfinite is None
    assert len(strategy.changes) == 2


@pytest.mark.parametrize("override", [False, True])
def test_state_of_other_policies_is_loaded_and_recorded(override):
    saved = running(ZClip(on_nonfinite="zero", max_consecutive_nonfinite=7)).state_dict()
    assert saved["policy"] == {"on_nonfinite": "zero", "max_consecutive_nonfinite": 7} and saved["changes"] == []
    strategy = ZClip(max_consecutive_nonfinite=7)
    strategy.load_state_dict(saved, override)
    assert strategy.on_nonfinite == "skip"
    assert strategy.changes == [{"setting": "on_nonfinite", "from": "zero", "to": "skip"}]
    again = ZClip(max_consecutive_nonfinite=7)
    again.load_state_dict(strategy.state_dict())
    assert again.changes == strategy.changes
    del saved["policy"]  # as before states had it
    before = ZClip()
    before.load_state_dict(saved, override)
    assert before.changes == []
    strategy.load_state_dict({**saved, "policy": {"max_consecutive_nonfinite": 7}}, override)
    assert strategy.changes == []


def test_rules_over_updates_have_no_policies():
    assert "policy" not in UpdateClip().state_dict()
    with pytest.raises(ValueError, match="it has 'policy': it may have "):
        UpdateClip().load_state_dict({**UpdateClip().state_dict(), "policy": {}})


class Zeroing(FixedNorm):
    """It takes a policy as an argument of its own."""

    def __init__(self, on_nonfinite="zero"):
        super().__init__(on_nonfinite=on_nonfinite)


def test_policy_that_is_an_argument_is_recorded_once():
    strategy = running(Zeroing())
    strategy.on_nonfinite = "skip"
    assert strategy.changes == [{"setting": "on_nonfinite", "from": "zero", "to": "skip"}]
    state = strategy.state_dict()
    assert state["config"] == {"on_nonfinite": "skip"} and state["policy"] == {"max_consecutive_nonfinite": 20}
    with pytest.raises(ValueError, match="made with on_nonfinite='skip', not 'zero'"):
        Zeroing().load_state_dict(state)


class Bounded(ClippingStrategy):
    """It takes the bound, and sets it in its own `__init__`."""

    def __init__(self, factor=2.0, max_grad_norm=None, **policy):
        super().__init__(**policy)
        self.factor = factor
        self.max_grad_norm = 10.0
        self.max_grad_norm = max_grad_norm

    def decide(self, norm, state):
        return Decision(self.factor * norm, state)


class Passing(ZClip):
    """It passes arguments on that it does not take by name."""

    def __init__(self, factor=1.0, **arguments):
        super().__init__(**arguments)
        self.factor = factor


@pytest.mark.parametrize(
    ("strategy", "name", "known"),
    [
        (FixedNorm(), "max_grad_norm", "max_norm"),
        (NoClipping(), "max_grad_norm", "none"),
        (AGC(), "max_grad_norm", "ratio, eps"),
        (Passing(max_grad_norm=1.0), "max_grad_norm", "factor"),
        (Passing(), "z_thresh", "factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_argument_of_a_base_class_that_a_class_does_not_take_cannot_be_assigned(strategy, name, known):
    before = getattr(strategy, name)
    words = rf"^{type(strategy).__name__} has no argument '{name}': it has {known}$"
    with pytest.raises(TypeError, match=words):
        strategy.change(**{name: 1.0})
    for value in (1.0, -1.0, None):
        with pytest.raises(TypeError, match=words):
            setattr(strategy, name, value)
    assert getattr(strategy, name) == before and strategy.changes == []


def test_argument_that_a_subclass_takes_can_be_assigned():
    strategy = running(Bounded(max_grad_norm=3.0))
    strategy.max_grad_norm = 0.5
    assert float(strategy.observe(torch.tensor(1.0))) == pytest.approx(0.5)
    assert strategy.changes == [{"setting": "max_grad_norm", "from": 3.0, "to": 0.5}]
    brake = type("Brake", (UpdateBrake,), {})()
    brake.margin = 2
    assert brake.changes == [{"setting": "margin", "from": 1.6, "to": 2}]
