"""Every strategy on random models, dtypes, optimizers and non-finite gradients, against float64 transcriptions."""

import io
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.zclip import transcriptions as equations
from tests.zclip.transcriptions import Step
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
from zclip.norm import parameters_of, tensor_norms

#: The strategies with the arguments of a few steps, and their equations.
STRATEGIES: dict[str, tuple[type[ClippingStrategy], type, dict[str, Any]]] = {
    "none": (NoClipping, equations.NoClippingEquations, {}),
    "fixed": (FixedNorm, equations.FixedNormEquations, {"max_norm": 0.5}),
    "autoclip": (AutoClip, equations.AutoClipEquations, {"percentile": 70}),
    "autoclip-window": (AutoClip, equations.AutoClipEquations, {"percentile": 35.0, "window": 3}),
    "zclip": (ZClip, equations.ZClipEquations, {"warmup_steps": 3, "z_thresh": 1.5, "recovery_window": 8}),
    "zclip-bounded": (
        ZClip,
        equations.ZClipEquations,
        {"warmup_steps": 2, "z_thresh": 1.0, "max_grad_norm": 3.0, "clip_option": "mean", "alpha": 0.5},
    ),
    "log-z-score": (
        LogZScore,
        equations.LogZScoreEquations,
        {"warmup_steps": 2, "z_thresh": 1.2, "alpha": 0.8, "max_grad_norm": 20.0},
    ),
    "lagged-z-score": (
        LaggedZScore,
        equations.LaggedZScoreEquations,
        {"z_thresh": 0.5, "lag": 2, "window": 3, "warmup_steps": 4},
    ),
    "tensor-autoclip": (TensorAutoClip, equations.TensorAutoClipEquations, {"percentile": 35.0, "window": 3}),
    "global-adagc": (GlobalAdaGC, equations.GlobalAdaGCEquations, {"warmup_steps": 2, "lambda_abs": 2.0, "beta": 0.7}),
    "adagc-recovery": (
        AdaGC,
        equations.AdaGCEquations,
        {"warmup_steps": 1, "lambda_abs": 0.01, "recovery_window": 8},
    ),
    "adagc": (AdaGC, equations.AdaGCEquations, {"warmup_steps": 3, "lambda_abs": 2.0, "beta": 0.7}),
    "stabilizer": (GradientStabilizer, equations.GradientStabilizerEquations, {}),
    "skip-step": (SkipStep, equations.SkipStepEquations, {"sigma": 1.5, "window": 5}),
    "agc": (AGC, equations.AGCEquations, {"ratio": 0.3}),
}
SHAPES = [(), (0,), (1,), (5,), (3, 4), (1, 60), (60, 1), (2, 0), (2, 3, 2)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIMIZERS = ["none", "sgd", "fused sgd", "fused adamw"]

SETTINGS = dict(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
FAST = settings(**SETTINGS, max_examples=6)
MANY = settings(**SETTINGS, max_examples=30)


class Case(NamedTuple):
    """A run: parameters, what clips and what steps, and for each step the scale of its gradients and a fault."""

    tensors: list[tuple[tuple[int, ...], torch.dtype]]
    optimizer: str
    holds_another: bool
    on_nonfinite: str
    steps: list[tuple[float, float | None]]
    seed: int


CASES = st.builds(
    Case,
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=4),
    st.sampled_from(OPTIMIZERS),
    st.booleans(),
    st.sampled_from(["skip", "zero", "raise"]),
    st.lists(
        st.tuples(
            st.sampled_from([1.0, 1.0, 0.01, 30.0]),
            st.sampled_from([None, None, None, math.nan, math.inf, -math.inf]),
        ),
        min_size=8,
        max_size=16,
    ),
    st.integers(0, 2**31),
)


def tolerance(dtype: torch.dtype) -> float:
    """The rounding of a product in this dtype, or of a norm that was summed in float32."""
    return max(4 * torch.finfo(dtype).eps, 2e-6)


def numpy(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy().copy()


def assert_close(actual: torch.Tensor, expected: np.ndarray, what: str) -> None:
    tiny = float(torch.finfo(actual.dtype).smallest_normal) * 2
    if actual.dtype in (torch.float16, torch.bfloat16):
        expected = torch.as_tensor(expected).to(actual.dtype).double().numpy()
    np.testing.assert_allclose(numpy(actual), expected, rtol=tolerance(actual.dtype), atol=tiny, err_msg=what)


def make_optimizer(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    if kind == "none":
        return None
    if kind == "fused adamw":
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)
    return torch.optim.SGD(parameters, lr=1.0, fused=kind == "fused sgd")


def assert_telemetry(strategy: ClippingStrategy, expected: dict[str, float]) -> None:
    read = strategy.read_telemetry()
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        # AGC sums the squares of a unit in float32, and z amplifies the rounding of a mean.
        assert read[key] == pytest.approx(float(value), rel=1e-5, abs=1e-7, nan_ok=True), key


def assert_statistics(strategy: ClippingStrategy, expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if value is not None:
            np.testing.assert_allclose(numpy(strategy.state[key]), value, rtol=1e-6, atol=1e-12, err_msg=key)


def check(name: str, case: Case) -> None:
    """Take all steps of a case, and compare each with the equations of the strategy."""
    strategy_class, equations_class, arguments = STRATEGIES[name]
    ours, expected = strategy_class(**arguments, on_nonfinite=case.on_nonfinite), equations_class(**arguments)
    draw = np.random.default_rng(case.seed)
    tensors = case.tensors
    if case.optimizer == "fused adamw":  # its first update, the sign of the gradient, is not comparable in 16 bits
        tensors = [(shape, torch.promote_types(dtype, torch.float32)) for shape, dtype in tensors]
    parameters = [nn.Parameter(torch.as_tensor(draw.normal(size=shape)).to(dtype)) for shape, dtype in tensors]
    other = nn.Parameter(torch.ones(3))
    held = [*parameters, other] if case.holds_another else parameters
    optimizer, twins = make_optimizer(case.optimizer, held), [nn.Parameter(p.detach().clone()) for p in held]
    twin_optimizer = make_optimizer(case.optimizer, twins)
    counters = {"consecutive_clips": 0, "nonfinite": 0, "consecutive_nonfinite": 0}
    for t, (scale, fault) in enumerate(case.steps):
        for p in parameters:
            gradient = torch.as_tensor(scale * draw.normal(size=tuple(p.shape))).to(p.dtype)
            p.grad = None if draw.random() < 0.15 else gradient
        other.grad = torch.ones(3)
        present = [p for p in parameters if p.grad is not None]
        loss = float(draw.normal(3, 0.1)) + (draw.random() < 0.1) if draw.random() < 0.8 else None
        if not present:
            with pytest.raises(ValueError, match="no parameter has a gradient"):
                ours.step(parameters, optimizer=optimizer)
            continue
        if fault is not None and present[-1].numel():
            present[-1].grad.view(-1)[0] = fault
        gradients = [numpy(p.grad) for p in parameters]
        finite = all(np.isfinite(g).all() for g in gradients if g is not None)
        tensor_loss = None if loss is None else torch.tensor(loss, dtype=torch.float64)
        before = {key: value.clone() for key, value in ours.state.items()}
        if not finite and case.on_nonfinite == "raise":
            with pytest.raises(FloatingPointError, match=r"the gradient norm is (nan|inf); so are the norms of"):
                ours.step(parameters, optimizer=optimizer, loss=tensor_loss)
            assert all(torch.equal(before[key], ours.state[key]) for key in before)
            continue
        # The rule gets the norms as they were measured: sums in float32 must not decide a comparison.
        norms = tensor_norms(parameters_of(parameters), [p.grad for p in parameters])
        norm = ours.step(parameters, optimizer=optimizer, loss=tensor_loss)
        assert norm.dtype == torch.float32 and norm.shape == ()
        if finite:
            exact = [0.0 if g is None else float(np.linalg.norm(g)) for g in gradients]
            np.testing.assert_allclose(norms.numpy(), exact, rtol=1e-5)
            assert float(norm) == pytest.approx(math.hypot(*exact), rel=1e-5)
            weights = [numpy(p) for p in parameters]
            factors = expected.clip(Step(norms.tolist(), loss, weights, gradients))
            skip = expected.skip
            counters["consecutive_clips"] = counters["consecutive_clips"] + 1 if expected.telemetry["clipped"] else 0
            counters["consecutive_nonfinite"] = 0
            assert_telemetry(ours, {**expected.telemetry, **counters})
        else:
            assert not math.isfinite(norm)
            factors, skip = 0.0, case.on_nonfinite == "skip"
            counters["nonfinite"] += 1
            counters["consecutive_nonfinite"] += 1
            assert all(torch.equal(before[key], ours.state[key]) for key in before)
            known = {"grad_norm", "clipped_norm", "clipped", "clipped_by_max", *counters}
            telemetry = {key: value for key, value in ours.read_telemetry().items() if key not in known}
            assert all(math.isnan(value) or value == 0 for value in telemetry.values())
            assert_telemetry(ours, {"grad_norm": float(norm), "clipped_norm": 0.0, "clipped": 1, "clipped_by_max": 0,
                                    **counters, **telemetry})  # fmt: skip
        assert_statistics(ours, expected.statistics)

        per_tensor = factors if isinstance(factors, list) else [factors] * len(parameters)
        after = [
            None if g is None else g * f if finite else np.zeros_like(g)
            for g, f in zip(gradients, per_tensor, strict=True)
        ]
        whole = optimizer is not None and not case.holds_another
        fused = whole and "fused" in case.optimizer
        in_place = not fused or isinstance(factors, list) or case.on_nonfinite == "zero"
        assert torch.equal(other.grad, torch.ones(3)), "another parameter's gradient is left alone"
        removed = skip and optimizer is not None and not fused
        for p, g, scaled in zip(parameters, gradients, after, strict=True):
            if g is None or removed:
                assert p.grad is None
            elif skip and finite and fused and not in_place:
                assert torch.isfinite(p.grad).all()
            elif in_place:
                assert_close(p.grad, scaled * 0 if skip else scaled, f"gradient at step {t}")
            elif finite:
                np.testing.assert_array_equal(numpy(p.grad), g)
        if in_place and finite and isinstance(expected, equations.GlobalEquations):
            total = math.hypot(*(float(p.grad.double().norm()) for p in present))
            assert total <= expected.bound * (1 + max(tolerance(p.dtype) for p in present)) + 1e-6

        if optimizer is None:
            continue
        for p, twin in zip(held, twins, strict=True):
            twin.data.copy_(p)
        stepped_by = [None if g is None or removed else g for g in after] + [np.ones(3)] * case.holds_another
        for p, twin, g in zip(held, twins, stepped_by, strict=True):
            twin.grad = None if g is None else torch.as_tensor(g).to(p.dtype)
        optimizer.step()
        if not (skip and whole):
            twin_optimizer.step()
        for p, twin in zip(held, twins, strict=True):
            bound = max(tolerance(p.dtype), 1e-5) * (1 + (float(twin.detach().abs().max()) if p.numel() else 0) + scale)
            np.testing.assert_allclose(numpy(p), numpy(twin), rtol=1e-5, atol=bound, err_msg=f"weights at step {t}")


@pytest.mark.parametrize("name", STRATEGIES)
@given(case=CASES)
@FAST
def test_step_follows_the_equations(name, case):
    check(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@given(case=CASES)
@MANY
def test_step_follows_the_equations_in_many_cases(name, case):
    check(name, case)


def gradients_of(strategy: ClippingStrategy, parameters: list[nn.Parameter], t: int) -> list[torch.Tensor]:
    """Set gradients that depend on the step only, and return them after a step of the strategy."""
    draw = torch.Generator().manual_seed(t)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype) * (30 if t % 5 == 4 else 1)
    strategy.step(parameters, loss=torch.tensor(3.0 + (t % 6 == 5) + 0.1 * (t % 3)))
    return [p.grad.clone() for p in parameters]


def check_restored(name: str, stop: int, steps: int, nonfinite: bool) -> None:
    strategy_class, _, arguments = STRATEGIES[name]
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5, dtype=torch.float64))]
    uninterrupted, restored = strategy_class(**arguments), strategy_class(**arguments)
    for t in range(stop):
        gradients_of(uninterrupted, parameters, t)
    if nonfinite:
        parameters[0].grad = torch.full((3, 4), torch.nan)
        uninterrupted.step(parameters)
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for t in range(stop, stop + steps):
        one = gradients_of(uninterrupted, parameters, t)
        other = gradients_of(restored, parameters, t)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), f"step {t}"
        np.testing.assert_equal(uninterrupted.read_telemetry(), restored.read_telemetry())
    assert all(torch.equal(restored.state[key], value) for key, value in uninterrupted.state.items())


@pytest.mark.parametrize("name", STRATEGIES)
@given(stop=st.integers(0, 14), nonfinite=st.booleans())
@FAST
def test_restored_strategy_continues_with_the_same_decisions(name, stop, nonfinite):
    check_restored(name, stop, 6, nonfinite)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@given(stop=st.integers(0, 40), nonfinite=st.booleans())
@MANY
def test_restored_strategy_continues_with_the_same_decisions_for_long(name, stop, nonfinite):
    check_restored(name, stop, 10, nonfinite)


@pytest.mark.parametrize("name", STRATEGIES)
@given(order=st.permutations(range(4)), seed=st.integers(0, 2**31))
@FAST
def test_order_and_grouping_of_parameters_do_not_matter(name, order, seed):
    """Sums in another order differ in the last bits of float64 only."""
    strategy_class, _, arguments = STRATEGIES[name]
    strategies = [strategy_class(**arguments) for _ in range(3)]
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double() for _ in strategies]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for t in range(6):
        draws = [torch.randn_like(p) * (20 if t == 4 else 1) for p in models[0].parameters()]
        for model in models:
            for p, g in zip(model.parameters(), draws, strict=True):
                p.grad = g.clone()
        shuffled, (first, second) = list(models[1].parameters()), models[2]
        whole = strategies[0].step(models[0])
        norms = (strategies[1].step([shuffled[i] for i in order]), strategies[2].step(first, [[second], first]))
        for norm, model in zip(norms, models[1:], strict=True):
            torch.testing.assert_close(norm, whole, rtol=1e-6, atol=0)
            for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
