"""Arguments can be changed in a running loop and where a state is loaded; the state records it."""

import abc
import copy
import inspect
import math

import pytest
import torch

from tests.zclip.every_strategy import SHORT
from tests.zclip.reference_loop import batch, build_model
from zclip import AutoClip, FixedNorm, GradientStabilizer, LaggedZScore, SkipStep, TensorAutoClip, ZClip
from zclip.updates import UpdateClip


def steps(strategy, first: int, last: int, model=None):
    """Take the steps from `first` to `last` - 1, and return the model."""
    model = model or build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(first, last):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        strategy.step(model, optimizer=optimizer)
        optimizer.step()
    return model


def test_changed_argument_acts_from_the_next_step_on_the_same_statistics():
    changed, other, unchanged = ZClip(warmup_steps=5), ZClip(warmup_steps=5, z_thresh=0.5), ZClip(warmup_steps=5)
    steps(changed, 0, 8)
    unchanged.load_state_dict(changed.state_dict())
    other.load_state_dict(changed.state_dict(), override=True)
    changed.change(z_thresh=0.5)
    for strategy in (changed, other, unchanged):
        steps(strategy, 8, 16)
    change = {"setting": "z_thresh", "from": 2.5, "to": 0.5}
    assert changed.changes == other.changes == [change]
    assert changed.state_dict()["config"]["z_thresh"] == 0.5 and changed.read_telemetry()["changes"] == 1
    assert str(changed.state_dict()) == str(other.state_dict())
    assert changed.state["mean"] != unchanged.state["mean"]
    assert ZClip().state_dict()["changes"] == []


def test_record_of_changes_is_restored_and_bounded():
    strategy, resumed = FixedNorm(1.0), FixedNorm(2.0)
    strategy.change(max_norm=2.0)
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.changes == strategy.changes == [{"setting": "max_norm", "from": 1.0, "to": 2.0}]
    for step in range(1500):
        strategy.change(max_norm=3.0 + step)
    assert len(strategy.changes) == 1000 and strategy.changes[-1]["to"] == 1502.0
    FixedNorm(1502.0).load_state_dict(strategy.state_dict())
    FixedNorm(1.0).load_state_dict(strategy.state_dict(), override=True)


def test_change_that_is_refused_changes_nothing():
    strategy = ZClip()
    steps(strategy, 0, 3)
    before = copy.deepcopy(strategy.state_dict())
    with pytest.raises(ValueError, match=r"^z_thresh=-1 is not allowed: it must be a number above 0$"):
        strategy.change(alpha=0.5, z_thresh=-1)
    with pytest.raises(TypeError, match=r"^ZClip has no argument 'zthresh': it has alpha, z_thresh, "):
        strategy.change(zthresh=3.0)
    assert str(strategy.state_dict()) == str(before)
    strategy = SkipStep(window=8)
    steps(strategy, 0, 3)
    before = copy.deepcopy(strategy.state_dict())
    reason = "the length of a history cannot change once norms were seen$"
    with pytest.raises(
        ValueError, match=rf"^the statistics do not fit sigma=3\.0 \(was 6\.0\), window=4 \(was 8\): {reason}"
    ):
        strategy.change(sigma=3.0, window=4)
    assert str(strategy.state_dict()) == str(before)
    other = SkipStep(window=4)
    with pytest.raises(ValueError, match=rf"^the statistics do not fit window=4 \(was 8\): {reason}"):
        other.load_state_dict(before, override=True)
    assert other.state == {}
    before["state"]["losses"] = before["state"]["losses"][:5]
    with pytest.raises(
        ValueError, match=r"^the saved SkipStep is damaged: state\.losses=a float64 tensor of shape \[5\]"
    ):
        SkipStep(window=8).load_state_dict(before, override=True)


@pytest.mark.parametrize(
    ("make", "window", "other"),
    [(AutoClip, 10, 20), (AutoClip, None, 10), (LaggedZScore, 10, 20), (TensorAutoClip, 10, 20), (UpdateClip, 10, 64)],
)
def test_window_that_has_seen_norms_is_named_where_it_is_changed(make, window, other):
    rule, changed = make(window=window), make(window=other)
    for step in range(25):
        rule.observe(1.0 + step % 3)
    before = str(rule.state_dict())
    reason = "the length of a history cannot change once norms were seen"
    words = rf"^the statistics do not fit window={other} \(was {window}\): {reason}$"
    with pytest.raises(ValueError, match=words):
        rule.window = other
    with pytest.raises(ValueError, match=words):
        changed.load_state_dict(rule.state_dict(), override=True)
    assert str(rule.state_dict()) == before and changed.state == {}


def test_block_of_another_length_starts_anew():
    strategy, resumed = ZClip(warmup_steps=5), ZClip(warmup_steps=5, recovery_window=10)
    model = steps(strategy, 0, 30)
    assert int(strategy.state["block_count"]) == 25
    resumed.load_state_dict(strategy.state_dict(), override=True)
    strategy.change(recovery_window=None)
    steps(strategy, 30, 33, model)
    assert int(strategy.state["block_count"]) == 0
    strategy.change(recovery_window=10)
    for changed in (strategy, resumed):
        assert changed.state["blocks"][0] == changed.state["mean"] and not changed.state["blocks"][1:].any()
        steps(changed, 33, 36, model)
        assert int(changed.state["block_count"]) == 3


def test_growing_history_goes_on_after_a_change():
    changed, expected = AutoClip(percentile=10.0), AutoClip(percentile=50.0)
    steps(changed, 0, 12)
    steps(expected, 0, 12)
    changed.change(percentile=50.0)
    assert changed._steps == expected._steps == 12
    changed.load_state_dict(expected.state_dict())
    model, other = steps(changed, 12, 20), steps(expected, 12, 20)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("running", [False, True])
def test_assigned_argument_is_checked_and_recorded_as_a_change(running):
    strategy, expected = ZClip(warmup_steps=5), ZClip(warmup_steps=5)
    model = steps(strategy, 0, 8 if running else 0)
    steps(expected, 0, 8 if running else 0)
    strategy.z_thresh, strategy.max_grad_norm = 3.0, 0.1
    expected.change(z_thresh=3.0)
    expected.change(max_grad_norm=0.1)
    assert strategy.changes == expected.changes and strategy.changes[0] == {
        "setting": "z_thresh",
        "from": 2.5,
        "to": 3.0,
    }
    before = str(strategy.state_dict())
    for name, value, allowed in (
        ("z_thresh", -3, "a number above 0"),
        ("max_grad_norm", "a", "a number above 0, or null for no bound"),
        ("mode", "z", "one of zscore, percentile"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}={value} is not allowed: it must be {allowed}$"):
            setattr(strategy, name, value)
    assert str(strategy.state_dict()) == before
    steps(strategy, 8, 9, model)
    assert strategy.read_telemetry()["clipped_by_max"] and strategy.read_telemetry()["changes"] == 2
    assert copy.deepcopy(strategy).changes == strategy.changes


@pytest.mark.parametrize("name", SHORT)
def test_every_argument_of_a_strategy_can_be_assigned(name):
    strategy = SHORT[name]()
    for argument in strategy.config():
        setattr(strategy, argument, getattr(strategy, argument))
        assert strategy.changes == [], "it is the same value"
        with pytest.raises(ValueError, match=rf"^{argument}=<object .* is not allowed: it must be "):
            setattr(strategy, argument, object())


@pytest.mark.parametrize("strategy", [ZClip, GradientStabilizer, UpdateClip], ids=lambda cls: cls.__name__)
def test_signature_of_a_class_is_that_of_its_arguments(strategy):
    """The framework reads types of arguments from it, and the names of runs depend on them."""
    arguments = [*inspect.signature(strategy.__init__).parameters.values()][1:]
    assert [*inspect.signature(strategy).parameters.values()] == arguments


def test_assigned_argument_of_a_rule_over_updates_is_checked_and_recorded():
    rule = UpdateClip()
    with pytest.raises(ValueError, match=r"^sigmas=-5 is not allowed: it must be a number above 0$"):
        rule.sigmas = -5
    rule.observe(torch.tensor(2.0))
    assert "update_changes" not in rule.read_telemetry()
    rule.sigmas = 2
    rule.observe(torch.tensor(math.nan))
    assert (
        rule.changes == [{"setting": "sigmas", "from": 3.0, "to": 2}] and rule.read_telemetry()["update_changes"] == 1
    )


class Doubling(FixedNorm, abc.ABC):
    """It assigns an argument of its base class and attributes of its own, in `__init__` and later."""

    def __init__(self, max_norm=1.0, *, label="a"):
        super().__init__(max_norm)
        self.max_norm = 2 * max_norm
        self.max_norm = max_norm
        self.label = label
        self.calls = 0

    def decide(self, norm, state):
        self.calls += 1
        return super().decide(norm, state)


def test_subclass_assigns_what_it_likes_in_init_and_its_own_attributes_later():
    strategy = Doubling(0.5)
    steps(strategy, 0, 3)
    assert strategy.calls == 3 and strategy.changes == []
    strategy.label = "b"
    assert strategy.changes == [{"setting": "label", "from": "a", "to": "b"}]


class Percent(FixedNorm):
    def __init__(self, percent=50.0, max_norm=1.0):
        super().__init__(max_norm)
        self.percent = percent / 100


def test_only_the_argument_that_is_changed_is_recorded():
    strategy = Percent()
    strategy.change(max_norm=2.0)
    assert strategy.changes == [{"setting": "max_norm", "from": 1.0, "to": 2.0}]
    assert strategy.percent == 0.5


@pytest.mark.parametrize(
    ("base", "own"), [(ZClip, {"warmup_steps": 5, "recovery_window": 80}), (GradientStabilizer, {"gamma1": 0.5})]
)
def test_arguments_that_a_subclass_passes_on_stay(base, own):
    class Passing(base):
        def __init__(self, factor=1.0, **policy):
            super().__init__(**policy)
            self.factor = factor

    strategy, resumed = Passing(**own), Passing(2.0, **own)
    steps(strategy, 0, 60)
    before = strategy.state_dict()
    resumed.load_state_dict(before, override=True)
    strategy.change(factor=2.0)
    for changed in (strategy, resumed):
        assert str(changed.state_dict()["state"]) == str(before["state"])
        assert changed.changes == [{"setting": "factor", "from": 1.0, "to": 2.0}]
        assert all(getattr(changed, name) == value for name, value in own.items())


class Limits(FixedNorm):
    def __init__(self, limits):
        super().__init__(1.0)
        self.limits = limits


@pytest.mark.parametrize(("one", "other"), [({"a": 1.0}, {"a": 2.0}), ([[0, 1.0]], [[0, 2.0]]), ("a", "b" * 2000)])
def test_change_of_an_argument_of_any_kind_can_be_loaded(one, other):
    strategy, resumed = Limits(one), Limits(one)
    strategy.change(limits=other)
    Limits(other).load_state_dict(strategy.state_dict())
    resumed.load_state_dict(Limits(other).state_dict(), override=True)
    Limits(one).load_state_dict(resumed.state_dict())
    assert [change["setting"] for change in strategy.changes + resumed.changes] == ["limits", "limits"]


def test_history_that_may_grow_after_a_change_is_loaded_again():
    strategy = AutoClip(window=10)
    model = steps(strategy, 0, 5)
    strategy.change(window=None)
    steps(strategy, 5, 25, model)
    assert len(strategy.state["history"]) == 40
    before = strategy.state_dict()
    strategy.load_state_dict(before)
    strategy.change(percentile=20.0)
    assert str(strategy.state_dict()["state"]) == str(before["state"])


def test_window_that_has_dropped_norms_cannot_become_the_full_history():
    strategy = AutoClip(window=1024)
    for step in range(1030):
        strategy.observe(torch.tensor(1.0 + step % 3))
    reason = (
        r"state\.history=a float64 tensor of shape \[1024\] is not allowed: it must be of all 1030 norms, of which a "
        r"window has dropped the first ones$"
    )
    with pytest.raises(ValueError, match=rf"^the statistics do not fit window=None \(was 1024\): {reason}"):
        strategy.window = None
    assert strategy.window == 1024 and strategy.changes == []


@pytest.mark.parametrize("loaded", [False, True])
def test_changed_decay_keeps_the_moments_that_are_corrected_for_bias(loaded):
    strategy, changed = GradientStabilizer(), GradientStabilizer(gamma1=0.99, gamma2=0.999)
    model = steps(strategy, 0, 9)
    if loaded:
        changed.load_state_dict(strategy.state_dict(), override=True)
    else:
        changed = copy.deepcopy(strategy)
        changed.change(gamma1=0.99, gamma2=0.999)
    for key, before, after in (("m", 0.7, 0.99), ("v", 0.9, 0.999)):
        corrected = changed.state[key] / (1 - after**9)
        torch.testing.assert_close(corrected, strategy.state[key] / (1 - before**9))
    steps(changed, 9, 10, model)
    assert changed.read_telemetry()["clipped_norm"] < 2.1  # of four tensors, each about 1
    damaged = {**strategy.state_dict(), "config": {"gamma1": "a", "gamma2": 0.9, "eps": 1e-8}}
    with pytest.raises(ValueError, match=r"'a'\): gamma1=a is not allowed: it must be a number from 0 to below 1$"):
        strategy.load_state_dict(damaged, override=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "changes={} is not allowed: it must be a list of at most 1000"),
        ([{}] * 1001, "changes=a list is not allowed|changes=\\[.* is not allowed: it must be a list of at most 1000"),
        ([3], r"changes\[0\]=3 is not allowed: it must be a list of setting, from, to"),
        ([["z_thresh"]], r"changes\[0\]=\['z_thresh'\] is not allowed: it must be a list of setting, from, to"),
        ([["a", 1, {}]], r"changes\[0\]\.to={} is not allowed: it must be a number, a text"),
        ([["a", 10**5000, 1]], r"changes\[0\]\.from=a int is not allowed"),
        ([["a" * 2000, 1, 1]], r"changes\[0\]\.setting='a+\.\.\. is not allowed"),
    ],
)
def test_damaged_record_of_changes_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^the saved ZClip is damaged: {message}"):
        ZClip().load_state_dict({**ZClip().state_dict(), "changes": changes})
