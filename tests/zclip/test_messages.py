"""Defaults, bounds of arguments and whole error messages of the clipper."""

import math
import subprocess
import sys
from decimal import Decimal

import numpy
import pytest
import torch
from torch import nn

import zclip
from tests.helpers import CHECKOUT
from zclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClippingStrategy,
    FixedNorm,
    GlobalAdaGC,
    GradientStabilizer,
    LaggedZScore,
    LogZScore,
    NoClipping,
    SkipStep,
    TensorAutoClip,
    ZClip,
)
from zclip.arguments import ArgumentError
from zclip.updates import SPAM

DEFAULTS = {
    NoClipping: {},
    FixedNorm: {"max_norm": 1.0},
    AutoClip: {"percentile": 10.0, "window": None},
    ZClip: {
        "alpha": 0.97, "z_thresh": 2.5, "max_grad_norm": None, "eps": 1e-6, "warmup_steps": 25, "mode": "zscore",
        "clip_option": "adaptive_scaling", "clip_factor": 1.0, "skip_update_on_spike": False, "recovery_window": 40,
    },
    AdaGC: {"lambda_rel": 1.04, "beta": 0.99, "warmup_steps": 100, "lambda_abs": 1.0, "recovery_window": None},
    GlobalAdaGC: {"lambda_rel": 1.04, "beta": 0.99, "warmup_steps": 100, "lambda_abs": 1.0, "recovery_window": None},
    LogZScore: {"alpha": 0.97, "z_thresh": 3.0, "max_grad_norm": None, "warmup_steps": 10, "min_std": 0.02},
    LaggedZScore: {"z_thresh": 3.0, "lag": 500, "window": 500, "warmup_steps": 100, "max_grad_norm": None},
    TensorAutoClip: {"percentile": 95.0, "window": 128},
    GradientStabilizer: {"gamma1": 0.7, "gamma2": 0.9, "eps": 1e-8},
    SkipStep: {"sigma": 6.0, "window": 128},
    AGC: {"ratio": 0.01, "eps": 1e-3},
}  # fmt: skip

POSITIVE = "a number above 0"
DECAY = "a number from 0 to below 1"
#: What is rejected, what the message says is allowed, and the nearest values that are accepted.
BOUNDS = [
    (ZClip, "alpha", [-1e-9, 1, 1.0, math.nan, True, "0.9", None], DECAY, [0, 0.0, 0.999]),
    (ZClip, "z_thresh", [0, -1.0, math.inf, math.nan, True, None], POSITIVE, [1e-9, 3]),
    (ZClip, "max_grad_norm", [0, -1.0, math.inf], f"{POSITIVE}, or null for no bound", [1e-9, None]),
    (ZClip, "eps", [0, 0.0, -1e-9], POSITIVE, [1e-30]),
    (ZClip, "warmup_steps", [0, -1, 1.0, True, 2**31, None], "an integer from 1", [1, 2**31 - 1]),
    (ZClip, "mode", ["median", None], "one of zscore, percentile", ["zscore", "percentile"]),
    (ZClip, "clip_option", ["min"], "one of adaptive_scaling, mean, max", ["adaptive_scaling", "mean", "max"]),
    (ZClip, "clip_factor", [0, -1], POSITIVE, [0.5, 2]),
    (ZClip, "skip_update_on_spike", [0, 1, None, "true"], "true or false", [True, False]),
    (ZClip, "recovery_window", [7, 0, 8.0], "an integer from 8, or null to switch recovery off", [8, None]),
    (FixedNorm, "max_norm", [0, -1, None], POSITIVE, [1e-9]),
    (AutoClip, "percentile", [-1e-9, 100.1, None, True], "a number from 0 to 100", [0, 100]),
    (AutoClip, "window", [0, 1.5], "an integer from 1, or null for the full history", [1, None]),
    (AdaGC, "lambda_rel", [0], POSITIVE, [1e-9]),
    (AdaGC, "beta", [1, -0.1], DECAY, [0]),
    (AdaGC, "warmup_steps", [0], "an integer from 1", [1]),
    (AdaGC, "lambda_abs", [0], POSITIVE, [1e-9]),
    (AdaGC, "recovery_window", [7, 8.0], "an integer from 8, or null to switch recovery off", [8, None]),
    (LogZScore, "alpha", [1, -0.1], DECAY, [0]),
    (LogZScore, "z_thresh", [0], POSITIVE, [1e-9]),
    (LogZScore, "warmup_steps", [0], "an integer from 1", [1]),
    (LogZScore, "min_std", [0], POSITIVE, [1e-9]),
    (LaggedZScore, "z_thresh", [0], POSITIVE, [1e-9]),
    (LaggedZScore, "lag", [-1, 1.5], "an integer from 0", [0]),
    (LaggedZScore, "window", [1, None], "an integer from 2", [2]),
    (LaggedZScore, "warmup_steps", [3], "an integer from 4", [4]),
    (TensorAutoClip, "percentile", [-1e-9, 100.1, None, True], "a number from 0 to 100", [0, 100]),
    (TensorAutoClip, "window", [1, None], "an integer from 2", [2]),
    (GradientStabilizer, "gamma1", [1, -0.1], DECAY, [0]),
    (GradientStabilizer, "gamma2", [1, -0.1], DECAY, [0]),
    (GradientStabilizer, "eps", [0], POSITIVE, [1e-30]),
    (SkipStep, "sigma", [0], POSITIVE, [1e-9]),
    (SkipStep, "window", [1, None], "an integer from 2", [2]),
    (AGC, "ratio", [0], POSITIVE, [1e-9]),
    (AGC, "eps", [0], POSITIVE, [1e-9]),
    (NoClipping, "on_nonfinite", ["ignore", None], "one of skip, zero, raise", ["skip", "zero", "raise"]),
    (NoClipping, "max_consecutive_nonfinite", [0, 1.0], "an integer from 1, or null for no limit", [1, None]),
]


@pytest.mark.parametrize("strategy", DEFAULTS, ids=lambda s: s.__name__)
def test_defaults_are_the_documented_ones(strategy):
    made = strategy()
    assert made.config() == DEFAULTS[strategy]
    assert (made.on_nonfinite, made.max_consecutive_nonfinite, made.max_grad_norm) == ("skip", 20, None)
    assert repr(made) == f"{strategy.__name__}({', '.join(f'{k}={v!r}' for k, v in DEFAULTS[strategy].items())})"


@pytest.mark.parametrize(
    ("strategy", "name", "rejected", "allowed", "accepted"), BOUNDS, ids=[f"{b[0].__name__}-{b[1]}" for b in BOUNDS]
)
def test_values_out_of_bounds_are_rejected_with_what_is_allowed(strategy, name, rejected, allowed, accepted):
    for value in rejected:
        with pytest.raises(ArgumentError) as error:
            strategy(**{name: value})
        words = f"{allowed}, not of type str" if value == "0.9" else allowed
        assert str(error.value) == f"{name}={value} is not allowed: it must be {words}"
        assert error.value.field == name and error.value.problem == f"is not allowed: it must be {words}"
        assert error.value.args == (name, value, error.value.problem)
    for value in accepted:
        assert getattr(strategy(**{name: value}), name) == value


def test_repr_has_the_scope_and_the_policies_that_are_set():
    made = FixedNorm(1.0, on_nonfinite="zero", max_consecutive_nonfinite=None, scope=["*.weight"])
    words = "on_nonfinite='zero', max_consecutive_nonfinite=None, scope=('*.weight',)"
    assert repr(made) == f"FixedNorm(max_norm=1.0, {words})"


@pytest.mark.parametrize(
    ("value", "type_name"), [(torch.tensor(2.5), "Tensor"), (Decimal("2.5"), "Decimal"), ("2.5", "str")], ids=str
)
def test_type_is_named_where_the_text_of_a_value_does_not_show_it(value, type_name):
    with pytest.raises(ArgumentError) as error:
        ZClip(z_thresh=value)
    allowed = "is not allowed: it must be a number above 0"
    assert str(error.value).endswith(f" {allowed}, not of type {type_name}") and "2.5" in str(error.value)


def test_numbers_of_numpy_become_plain_numbers():
    made = ZClip(z_thresh=numpy.float32(2.5), warmup_steps=numpy.int64(3), max_grad_norm=numpy.float64(1.0))
    values = (made.z_thresh, made.warmup_steps, made.max_grad_norm, SPAM(numpy.float16(4.0)).theta)
    assert [(type(value), value) for value in values] == [(float, 2.5), (int, 3), (float, 1.0), (float, 4.0)]
    for name, value in (("z_thresh", numpy.float32(math.nan)), ("warmup_steps", numpy.float32(3.0))):
        with pytest.raises(ArgumentError, match=rf"^{name}={value} is not allowed: .*, not of type float32$"):
            ZClip(**{name: value})


def test_unknown_argument_is_named():
    with pytest.raises(TypeError) as error:
        FixedNorm(1.0, zeta=1, beta=2)
    assert str(error.value) == "FixedNorm() got an unexpected keyword argument 'beta'"
    with pytest.raises(AttributeError, match=r"^module 'zclip' has no attribute 'Nothing'$"):
        zclip.Nothing  # noqa: B018


def test_rules_over_updates_are_imported_on_first_access():
    code = (
        "import sys, zclip\n"
        "assert 'zclip.updates' not in sys.modules and 'updates' not in zclip.__all__\n"
        "zclip.updates.UpdateClip()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "module", "requirement"),
    [
        ("ClippingCallback", "lightning", "lightning"),
        ("ZClipLightningCallback", "lightning", "lightning"),
        ("TrainerClippingCallback", "transformers", "'transformers[torch]'"),
    ],
)
def test_missing_requirement_of_an_integration_is_named(name, module, requirement, monkeypatch):
    monkeypatch.setitem(sys.modules, f"zclip.integrations.{module}", None)  # importing it raises
    with pytest.raises(ModuleNotFoundError) as error:
        getattr(zclip, name)
    assert str(error.value) == f"zclip.{name} needs {module}: pip install {requirement}"
    assert error.value.name == f"zclip.integrations.{module}"


@pytest.mark.parametrize(("count", "more"), [(1, ""), (5, ""), (7, " and 2 more")])
def test_raise_policy_names_five_parameters_at_most(count, more):
    parameters = [nn.Parameter(torch.ones(2, i + 1)) for i in range(8)]
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, math.nan if i < count else 1.0)
    named = ", ".join(f"parameter {i} of shape (2, {i + 1})" for i in range(min(count, 5)))
    with pytest.raises(FloatingPointError) as error:
        NoClipping(on_nonfinite="raise").step(parameters)
    assert str(error.value) == f"the gradient norm is nan; so are the norms of the gradients of {named}{more}"
    with pytest.raises(FloatingPointError) as error:
        NoClipping(on_nonfinite="raise").observe(torch.tensor(math.inf))
    assert str(error.value) == "the gradient norm is inf"


def test_too_many_consecutive_nonfinite_norms_say_what_to_do():
    strategy = NoClipping(max_consecutive_nonfinite=2)
    strategy.observe(torch.tensor(math.nan))
    with pytest.raises(FloatingPointError) as error:
        strategy.observe(torch.tensor(math.nan))
    assert str(error.value) == (
        "the gradient norm was NaN or infinite 2 times in a row: the run has most likely diverged. Restart from an "
        "earlier checkpoint with a lower learning rate, or skip the data that caused it; in fp16, check the loss "
        "scale. max_consecutive_nonfinite sets how many are tolerated"
    )
    tolerant = NoClipping(max_consecutive_nonfinite=None)
    for _ in range(25):
        tolerant.observe(torch.tensor(math.nan))
    assert tolerant.read_telemetry()["consecutive_nonfinite"] == 25


def test_twentieth_consecutive_nonfinite_norm_raises_by_default():
    strategy = NoClipping()
    for _ in range(19):
        strategy.observe(torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match="20 times in a row"):
        strategy.observe(torch.tensor(math.nan))


def message(error: type[Exception], call, *arguments, **keywords) -> str:
    with pytest.raises(error) as raised:
        call(*arguments, **keywords)
    return str(raised.value)


def test_mistakes_in_the_arguments_of_step_say_what_to_pass():
    assert message(ValueError, NoClipping().step, nn.Linear(2, 2)) == (
        "no parameter has a gradient: call step() after loss.backward() and before optimizer.zero_grad(), on the "
        "module that was trained, with parameters that require gradients (DeepSpeed's engine keeps gradients to "
        "itself: use attach(engine))"
    )
    assert message(TypeError, NoClipping().step, "weight") == (
        "'weight' is not a parameter: pass modules, parameters, or iterables of either, without names"
    )
    assert message(TypeError, NoClipping().step, 3) == (
        "step() takes modules, parameters, and iterables of either, not int; an optimizer goes into optimizer="
    )
    assert message(NotImplementedError, ClippingStrategy().observe, torch.tensor(1.0)) == (
        "ClippingStrategy must implement decide(norm, state)"
    )
    assert message(ValueError, AGC().observe, torch.tensor(1.0)) == (
        "AGC needs weights and gradients: a norm alone is not enough"
    )
    assert message(ValueError, NoClipping().prepare, []) == (
        "prepare() takes the parameters to train, on their device: there are none, or on meta"
    )
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.grad = torch.ones_like(wave)
    assert message(TypeError, NoClipping().step, wave) == (
        "the gradient of a parameter of shape (2,) is complex: it must be dense and real"
    )


def test_mistakes_in_a_saved_state_say_what_is_wrong():
    saved = ZClip().state_dict()
    assert (
        saved.keys() == {"strategy", "version", "config", "state", "counters", "started", "scope", "policy", "changes"}
        and saved["started"]
    )
    assert (saved["strategy"], saved["version"], FixedNorm().state_dict()["version"]) == ("ZClip", 2, 1)
    assert message(ValueError, ZClip().load_state_dict, {"strategy": "ZClip", "state": {}}) == (
        "this is not the state of a clipping strategy: it lacks version, config, counters"
    )
    assert message(ValueError, FixedNorm().load_state_dict, saved) == (
        "state of ZClip (version 2) cannot be loaded into FixedNorm (version 1)"
    )
    assert message(ValueError, ZClip(alpha=0.9, eps=1e-3).load_state_dict, saved) == (
        "the saved ZClip was made with alpha=0.97, not 0.9, eps=1e-06, not 0.001: make this one with the same "
        "arguments, or load it with override=True"
    )
    damaged = {**saved, "state": {key: value for key, value in saved["state"].items() if key not in ("mean", "var")}}
    assert message(ValueError, ZClip().load_state_dict, damaged) == (
        "the saved ZClip is damaged: state lacks mean, var"
    )
    empty = {**saved, "state": {}, "counters": {}}
    assert message(ValueError, ZClip().load_state_dict, empty) == (
        "the saved ZClip has statistics, but none were loaded: call prepare(model) before"
    )


def test_telemetry_is_empty_before_the_first_step():
    assert NoClipping().read_telemetry() == {} and NoClipping().telemetry == {}


def test_statistics_of_tensors_take_one_set_of_parameters():
    def parameters(*lengths: int) -> list[nn.Parameter]:
        made = [nn.Parameter(torch.ones(length)) for length in lengths]
        for p in made:
            p.grad = torch.ones_like(p)
        return made

    strategy, model = AdaGC(), nn.Linear(3, 2)
    strategy.step(parameters(2, 3, 4, 5))
    advice = "give it the module, whose names tell its parameters apart, or always the same parameters"
    was = "4 tensors (parameter 0 of shape (2,), parameter 1 of shape (3,), parameter 2 of shape (4,), ...)"
    for lengths, given in (((2,), "1 tensor (parameter 0 of shape (2,))"), ((2, 3, 4, 6), was)):
        assert message(ValueError, strategy.step, parameters(*lengths)) == (
            f"AdaGC has statistics of {was}, but step() was given {given}: {advice}"
        )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    named = AdaGC()
    named.step(model)
    other = nn.Sequential(model)
    named._objects = []
    assert message(ValueError, named.step, other) == (
        "AdaGC has statistics of 2 tensors (weight of shape (2, 3), bias of shape (2,)), but step() was given 2 "
        "tensors (0.weight of shape (2, 3), 0.bias of shape (2,)): use one strategy for one model"
    )
