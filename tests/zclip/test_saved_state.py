"""A damaged or hostile state is refused in one sentence and changes nothing; a state that was saved always loads."""

import copy
import io
import json
import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerState, TrainingArguments

from tests.helpers import same
from tests.zclip.every_strategy import SHORT
from zclip import (
    AGC,
    AutoClip,
    ClippingCallback,
    ClippingStrategy,
    Decision,
    TrainerClippingCallback,
    ZClip,
)
from zclip.updates import UpdateBrake, UpdateClip

EACH = pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)


def used(make, steps: int = 7) -> ClippingStrategy:
    """A strategy after some steps on two tensors, of which the second has no gradient at first."""
    strategy = make()
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
    for t in range(steps):
        for p in parameters[: 1 + (t > 2)]:
            p.grad = torch.full_like(p, 1.0 + t % 3)
        strategy.step(parameters, loss=torch.tensor(2.0 - t))
    return strategy


def refusal(strategy: ClippingStrategy, state: object) -> str:
    """The sentence that refuses a state, which must leave the strategy as it was."""
    before = copy.deepcopy((strategy.state_dict(), strategy.__dict__.get("_steps")))
    with pytest.raises(ValueError) as error:
        strategy.load_state_dict(state)
    assert same(before[0], strategy.state_dict()) and before[1] == strategy.__dict__.get("_steps")
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 2000
    return sentence


def without(entries: dict, key: str) -> dict:
    return {name: value for name, value in entries.items() if name != key}


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize("make", [ZClip, UpdateClip, UpdateBrake])
def test_argument_that_is_unknown_or_missing_is_damage(make, override):
    rule = make()
    saved, first = make().state_dict(), next(iter(rule.config()))
    damaged = f"the saved {make.__name__} is damaged: config"
    with pytest.raises(ValueError, match=f"^{damaged} has 'foo': it may have {first}, "):
        rule.load_state_dict(with_entry(saved, "config", "foo", 1), override)
    with pytest.raises(ValueError, match=f"^{damaged} lacks {first}$"):
        rule.load_state_dict({**saved, "config": without(saved["config"], first)}, override)
    assert rule.changes == []
    for added, value in make.added.items():
        same_state = {**saved, "config": without(saved["config"], added)}
        make(**{added: value}).load_state_dict(same_state, override)


def with_entry(state: dict, where: str, key: str, value: object) -> dict:
    return {**state, where: {**state[where], key: value}}


def expanded(value: torch.Tensor) -> torch.Tensor:
    """A tensor of a terabyte in one element of memory."""
    return value.flatten()[:1].expand(2**37)


#: Changes of any entry that make it impossible, whatever it is.
DAMAGE = {
    "float": lambda value: 1.0,
    "bool": lambda value: True,
    "text": lambda value: "1",
    "list": lambda value: [1.0],
    "half": lambda value: value.half(),
    "bool-tensor": lambda value: value.bool(),
    "int32": lambda value: value.int(),
    "complex": lambda value: value.to(torch.complex64),
    "shape": lambda value: torch.stack([value, value]),
    "huge": expanded,
    "meta": lambda value: value.to("meta"),
    "sparse": lambda value: value.reshape(1, -1).to_sparse(),
}


@EACH
def test_each_entry_of_another_kind_is_refused(make):
    strategy = used(make)
    state = strategy.state_dict()
    for where in ("state", "counters"):
        for key, value in state[where].items():
            for damage in DAMAGE.values():
                sentence = refusal(strategy, with_entry(state, where, key, damage(value)))
                assert f"{where}.{key}=" in sentence and "is not allowed: it must be a dense" in sentence


@EACH
def test_each_value_out_of_range_is_refused(make):
    strategy = used(make)
    state = strategy.state_dict()
    assert any(value.numel() > 1 for value in state["state"].values()) or not strategy.per_tensor
    for where in ("state", "counters"):
        for key, value in state[where].items():
            floating = value.is_floating_point()
            numbers = [math.nan, -math.inf, -1.0] if floating else [-1, 2**53 + 1, -(2**63)]
            if key not in ("gamma", "history"):  # infinity means that there is no value yet
                numbers += [math.inf] if floating else []
            for number in [n for n in numbers if where == "counters" or key in strategy.nonnegative or n != -1.0]:
                damaged = value.clone()
                damaged.view(-1)[-1] = number
                sentence = refusal(strategy, with_entry(state, where, key, damaged))
                index = str([length - 1 for length in value.shape]) if value.ndim else ""
                assert f"{where}.{key}{index}={number} is not allowed: it must be a" in sentence, sentence


@EACH
def test_missing_and_unknown_entries_are_refused(make):
    strategy = used(make)
    state = strategy.state_dict()
    assert "has 'more': it may have strategy, version, config" in refusal(strategy, {**state, "more": 1})
    for key in ("strategy", "version", "config", "state", "counters"):
        assert f"lacks {key}" in refusal(strategy, {name: value for name, value in state.items() if name != key})
        for value in (None, 3, 1.5, "x", [1], {"a": 1}, torch.ones(2), torch.ones(()), math.nan, {1: {2: 3}}, {}):
            if not (key == "state" and value == {} and not state["state"]) and not (key == "config" and value == {}):
                refusal(strategy, {**state, key: value})
    for where in ("state", "counters"):
        assert f"{where} has 'more'" in refusal(strategy, with_entry(state, where, "more", torch.zeros(())))
        for key in state[where]:
            short = {name: value for name, value in state[where].items() if name != key}
            assert f"{where} lacks {key}" in refusal(strategy, {**state, where: short})
    refusal(strategy, {**state, "started": 1})
    for value in (None, 3, "skip", [], torch.ones(2), {1: 2}, {"scope": None}, {"more": "x" * 10**6}):
        sentence = refusal(strategy, {**state, "policy": value})
        assert sentence.startswith(f"the saved {type(strategy).__name__} is damaged: policy")
    for name, allowed in (("on_nonfinite", "one of skip, zero, raise"), ("max_consecutive_nonfinite", "an integer fr")):
        for value in ("x" * 10**6, [], {}, torch.ones(2), torch.ones(()), math.nan, 0, 10**5000, True, [["skip"]] * 99):
            sentence = refusal(strategy, with_entry(state, "policy", name, value))
            assert f"policy.{name}=" in sentence and f" is not allowed: it must be {allowed}" in sentence
    for other in (None, 3, [], "x", torch.ones(3), {}):
        assert refusal(strategy, other).startswith("this is not the state of a clipping strategy: it ")


def test_huge_and_deep_values_are_cut_short_in_the_message():
    strategy, deep = ZClip(), []
    for _ in range(5_000):
        deep = [deep]
    state = strategy.state_dict()
    for value in ("x" * 10**5, deep, [deep], list(range(10**5)), 10**5000, torch.ones(9, 9)):
        for key in ("strategy", "version", "config", "state", "counters", "started"):
            refusal(strategy, {**state, key: value})
        for where in ("state", "counters", "config"):
            refusal(strategy, with_entry(state, where, next(iter(state[where])), value))
        refusal(strategy, with_entry(state, "config", "x" * 10**6, value))
    refusal(strategy, {**state, "config": dict.fromkeys(map(str, range(10**4)))})


def test_the_sentence_names_the_entry_its_value_and_what_is_allowed():
    strategy = used(SHORT["zclip"])
    state = strategy.state_dict()
    nan = with_entry(state, "state", "mean", torch.tensor(math.nan, dtype=torch.float64))
    assert refusal(strategy, nan) == (
        "the saved ZClip is damaged: state.mean=nan is not allowed: it must be a finite number from 0"
    )
    half = with_entry(state, "state", "var", torch.ones((), dtype=torch.float16))
    assert refusal(strategy, half) == (
        "the saved ZClip is damaged: state.var=1.0 is not allowed: it must be a dense float64 or float32 tensor of "
        "shape []"
    )
    many = with_entry(state, "state", "block_count", torch.tensor(40))
    assert refusal(strategy, many).endswith("state.block_count=40 is not allowed: it must be an integer from 0 to 39")
    spikes = with_entry(state, "state", "block_spikes", state["state"]["block_count"] + 1)
    assert refusal(strategy, spikes).endswith("it must be an integer from 0 to block_count=3")
    adagc = used(SHORT["adagc"])
    state = adagc.state_dict()
    nan = with_entry(state, "state", "gamma", torch.tensor([1.0, math.nan], dtype=torch.float64))
    assert refusal(adagc, nan).endswith("state.gamma[1]=nan is not allowed: it must be a finite number from 0 or inf")
    with_entry(state, "state", "gamma", torch.ones(2))


def test_history_of_autoclip_is_as_long_as_its_count_says():
    strategy = used(AutoClip)
    state = strategy.state_dict()
    history, inf = state["state"]["history"], torch.full((1024,), torch.inf, dtype=torch.float64)
    for damaged in (inf, torch.cat([history, inf]), history[:5], torch.ones_like(history)):
        assert "state.history=a float64 tensor" in refusal(strategy, with_entry(state, "state", "history", damaged))
    for count in (0, 6, 8, 2000, 2**40):
        refusal(strategy, with_entry(state, "state", "count", torch.tensor(count)))
    window = used(SHORT["autoclip-window"])
    window.load_state_dict(with_entry(window.state_dict(), "state", "count", torch.tensor(2**40)))


def test_history_that_doubled_during_nonfinite_steps_loads_again():
    strategy = AutoClip(max_consecutive_nonfinite=None)
    for t in range(1100):
        strategy.observe(torch.tensor(math.nan if t < 500 else 1.0))
    assert strategy.state_dict()["state"]["history"].shape == (2048,)
    restored = AutoClip(max_consecutive_nonfinite=None)
    restored.load_state_dict(strategy.state_dict())
    assert same(restored.state_dict(), strategy.state_dict())


NORMS = st.floats(0, 1.7976931348623157e308) | st.sampled_from([0.0, 1.0, 1e-320, 1e154, 1e200, math.nan, math.inf])


@EACH
@given(norms=st.lists(NORMS, max_size=12), loss=st.none() | st.floats(width=32))
@settings(derandomize=True, database=None, deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
def test_whatever_was_saved_loads_again(make, norms, loss):
    strategies = [make()]
    if isinstance(strategies[0], ZClip):
        strategies.append(ZClip(warmup_steps=1, z_thresh=1e-3, clip_factor=1e300))
    for strategy in strategies:
        for norm in norms:
            if not isinstance(strategy, AGC):
                strategy.observe(torch.tensor(norm, dtype=torch.float64), None if loss is None else torch.tensor(loss))
        file = io.BytesIO()
        torch.save(strategy.state_dict(), file)
        file.seek(0)
        restored = type(strategy)(**strategy.config())
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert same(restored.state_dict(), strategy.state_dict())


class Unsigned(ClippingStrategy):
    """A strategy of a user, whose statistic may be below 0, and has no value before the first step."""

    def initial_state(self, like):
        return {"log": torch.full_like(like, torch.nan)}

    def decide(self, norm, state):
        return Decision(norm, {"log": norm.log()})


def test_own_strategy_may_have_negative_and_missing_statistics():
    strategy, other = Unsigned(), Unsigned()
    other.load_state_dict(strategy.state_dict())
    assert other.state["log"].isnan()
    strategy.observe(torch.tensor(0.5))
    other.load_state_dict(strategy.state_dict())
    assert other.state["log"] == math.log(0.5)
    infinite = with_entry(strategy.state_dict(), "state", "log", torch.tensor(math.inf))
    assert refusal(other, infinite).endswith("state.log=inf is not allowed: it must be a finite number or nan")


class Alternate(ClippingStrategy):
    def initial_state(self, like):
        return {"odd": torch.zeros((), dtype=torch.bool)}

    def decide(self, norm, state):
        return Decision(2 * norm, {"odd": ~state["odd"]})


def test_truth_values_load_again():
    strategy, resumed = Alternate(), Alternate()
    strategy.observe(torch.tensor(1.0))
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.state["odd"]


def test_restored_parameters_of_another_library_do_not_require_gradients():
    strategy = used(SHORT["zclip"])
    trained = with_entry(strategy.state_dict(), "state", "mean", torch.tensor(1.0, requires_grad=True))
    strategy.load_state_dict(trained)
    assert not strategy.state["mean"].requires_grad


def test_lightning_callback_refuses_a_state_as_a_whole():
    callback = ClippingCallback(ZClip())
    state = ZClip().state_dict()
    damaged = with_entry(state, "state", "mean", torch.tensor(math.nan))
    for strategies in ([state, damaged], [used(ZClip).state_dict(), None], [3] * 1000):
        with pytest.raises(ValueError, match=r"the saved ZClip is damaged|not the state of a clipping strategy"):
            callback.load_state_dict({"strategies": strategies})
        assert len(callback.strategies) == 1 and same(callback.strategy.state_dict(), state)
    for other in (None, {}, {"strategies": None}, {"strategies": []}, {"strategies": 3}, [state]):
        with pytest.raises(
            ValueError, match=r"^this is not the state of a clipping callback: it lacks a list of strat"
        ):
            callback.load_state_dict(other)


def restore(saved: object, tmp_path) -> ClippingStrategy:
    """Start training as the Trainer does from a checkpoint with this state of the callback."""
    callback = TrainerClippingCallback(ZClip())
    state = TrainerState()
    state.stateful_callbacks = json.loads(json.dumps({"TrainerClippingCallback": saved}))
    args = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=0.0, use_cpu=True, report_to=[])
    Accelerator(cpu=True)  # the Trainer makes one, and resets its state for other arguments
    callback.on_train_begin(args, state, None)
    return callback.strategy


def test_trainer_callback_refuses_a_damaged_checkpoint(tmp_path):
    saved = TrainerClippingCallback(used(ZClip)).state()
    assert same(restore(saved, tmp_path).state_dict(), used(ZClip).state_dict())
    strategy = saved["args"]["strategy"]
    for value in (
        None, 3, "mean", {}, {"dtype": "float64"}, {"dtype": "load", "values": 1.0}, {"dtype": [], "values": 1.0},
        {"dtype": "float64", "values": "x"}, {"dtype": "float64", "values": [[1.0], [1.0, 2.0]]},
        {"dtype": "float64", "values": math.nan}, {"dtype": "int64", "values": 10**30}, {"dtype": "int64", "values": 1},
        {"dtype": "float64", "values": {}}, {"dtype": "float64", "values": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"state\.mean=.* is not allowed: it must be a "):
            restore({"args": {"strategy": with_entry(strategy, "state", "mean", value)}}, tmp_path)
    for other in (None, 3, {}, {"args": None}, {"args": {}}):
        with pytest.raises(ValueError, match=r"trainer_state\.json has no strategy: it is damaged"):
            restore(other, tmp_path)
    for other in (None, 3, {"state": 3, "counters": []}, {**strategy, "state": None}):
        with pytest.raises(ValueError, match=r"^(this is not the state of a|the saved ZClip is damaged)"):
            restore({"args": {"strategy": other}}, tmp_path)
