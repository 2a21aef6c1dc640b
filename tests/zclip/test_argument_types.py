"""Arguments of other types than Python's own: numbers, truth values and texts become plain, arrays are refused."""

import enum
import io

import numpy
import pytest
import torch

from tests.helpers import same
from tests.zclip.test_messages import BOUNDS
from zclip import AGC, ClippingStrategy, Decision, FixedNorm, NoClipping, ZClip
from zclip.state import TelemetryNameError
from zclip.updates import SPAM, UpdateBrake, UpdateClip, UpdateDecision, UpdateRule


class Word(enum.StrEnum):
    SKIP = "skip"
    ZERO = "zero"
    PERCENTILE = "percentile"
    WEIGHTS = "*.weight"


class Named(str, enum.Enum):  # noqa: UP042
    """Its text is the name of the member, not the value."""

    ZERO = "zero"
    PERCENTILE = "percentile"
    WEIGHTS = "*.weight"


class Labelled(FixedNorm):
    def __init__(self, label, **policy):
        super().__init__(1.0, **policy)
        self.label = label


def saved(strategy):
    """What a file has of a state, as a program reads it that trusts nobody."""
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("words", [Word, Named, lambda text: numpy.str_(text)], ids=["StrEnum", "Enum", "numpy"])
def test_texts_of_subclasses_are_saved_as_plain_texts(words):
    text, mode, zero = words("*.weight"), words("percentile"), words("zero")
    strategies = (
        ZClip(mode=mode, scope=text, on_nonfinite=zero),
        ZClip(mode=mode, scope=[text], on_nonfinite=zero),
        Labelled(text),
        Labelled({text: [mode]}),
    )
    for strategy in strategies:
        strategy.load_state_dict(saved(strategy))
    assert [type(strategy.mode) for strategy in strategies[:2]] == [str, str] and strategies[0].mode == "percentile"
    assert strategies[0].state_dict()["scope"] == strategies[1].state_dict()["scope"] == ["*.weight"]
    assert type(strategies[0].on_nonfinite) is str and strategies[0].on_nonfinite == "zero"
    assert strategies[2].config() == {"label": "*.weight"} and type(strategies[2].config()["label"]) is str
    changed = ZClip()
    changed.state_dict()
    changed.mode, changed.scope = mode, text
    assert saved(changed)["changes"] == [["mode", "zscore", "percentile"], ["scope", None, ["*.weight"]]]


def test_truth_values_of_numpy_become_plain_ones():
    strategy = ZClip(skip_update_on_spike=numpy.bool_(True))
    assert strategy.skip_update_on_spike is True
    assert saved(Labelled(numpy.bool_(False)))["config"] == {"label": False}


#: Numbers that a rule can compute with as floats only: torch's integers end at 2**63, and squares of floats at 1e308.
LARGE = [10**19, 2**62, 2**31, 10**300, 1e300]


@pytest.mark.parametrize("value", LARGE, ids=map("{:.0e}".format, LARGE))
def test_large_numbers_act_as_floats(value):
    made = [
        strategy(**{name: value}) for strategy, name, _, allowed, _ in BOUNDS if allowed.startswith("a number above 0")
    ]
    made += [SPAM(theta=value), UpdateBrake(margin=value), UpdateBrake(sigmas=value), UpdateClip(sigmas=value)]
    assert len(made) > 15
    for rule in made:
        for step in range(45):
            if not isinstance(rule, SPAM | AGC):
                assert 0 <= rule.observe(torch.tensor(1.0 + step % 3)) < torch.inf, rule
        assert all(type(number) is not int or number < 2**31 for number in rule.config().values())
        if isinstance(rule, AGC):
            parameter = torch.nn.Parameter(torch.ones(2, 2))
            parameter.grad = torch.ones(2, 2)
            rule.step([parameter])
            assert parameter.grad.isfinite().all()
        assert same(saved(rule)["config"], rule.config())


def test_number_that_float64_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"is not allowed: it must be a number above 0$"):
        FixedNorm(10**400)
    with pytest.raises(ValueError, match=r"^max_consecutive_nonfinite=.* is not allowed: it must be an integer from 1"):
        NoClipping(max_consecutive_nonfinite=10**19)


ARRAYS = [numpy.ones(2), torch.ones(2), torch.tensor(1.5), [numpy.ones(2)], {"a": torch.ones(2)}, (1.0, numpy.ones(1))]


@pytest.mark.parametrize("array", ARRAYS, ids=repr)
def test_argument_that_is_an_array_is_refused_in_one_sentence(array):
    words = "^Labelled must keep its argument label as a number or a list, not as a (ndarray|Tensor): a saved state rec"
    with pytest.raises(TypeError, match=words):
        Labelled(array).observe(torch.tensor(1.0))
    strategy = Labelled([1.0, 1.0])
    for _ in range(2):
        with pytest.raises(TypeError, match=words):
            strategy.label = array
        assert strategy.label == [1.0, 1.0] and strategy.changes == []
        strategy.observe(torch.tensor(1.0))


class Recording(ClippingStrategy):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def decide(self, norm, state):
        return Decision(norm, state, {self.name: norm})


class RecordingRule(UpdateRule):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def decide(self, norm, state):
        never = torch.zeros_like(norm, dtype=torch.bool)
        return UpdateDecision(None, never, torch.full_like(norm, torch.inf), state, {self.name: norm})


@pytest.mark.parametrize(
    ("rule", "name"), [(Recording, "changes"), (Recording, "other_norm"), (RecordingRule, "update_changes")]
)
def test_telemetry_must_not_have_a_name_that_is_recorded_at_times(rule, name):
    words = f"^telemetry of {rule.__name__} must not have the name {name}, which every rule records$"
    with pytest.raises(TelemetryNameError, match=words):
        rule(name).observe(torch.tensor(1.0))
    rule("own").observe(torch.tensor(1.0))
