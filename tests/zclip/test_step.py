"""`step` on real gradients: scaling, errors, statistics, telemetry and saved states."""

import copy
import io
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import same
from tests.zclip.every_strategy import OF_NORMS, SHORT
from zclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClippingStrategy,
    Decision,
    FixedNorm,
    GradientStabilizer,
    NoClipping,
    SkipStep,
    ZClip,
)
from zclip.updates import UpdateClip

STRATEGIES = {
    "none": NoClipping,
    "fixed": lambda: FixedNorm(0.5),
    "autoclip": lambda: AutoClip(percentile=20),
    "autoclip-window": lambda: AutoClip(percentile=20, window=8),
    "zclip": lambda: ZClip(warmup_steps=5),
    "zclip-mean": lambda: ZClip(warmup_steps=5, clip_option="mean", max_grad_norm=2.0),
    "zclip-max": lambda: ZClip(warmup_steps=5, clip_option="max"),
}


@pytest.fixture(params=STRATEGIES)
def make(request):
    return STRATEGIES[request.param]


def model_with_gradients(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)
    for p in model.parameters():
        p.grad = (torch.randn_like(p) * scale).to(dtype)
    return model


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def test_step_returns_the_norm_and_scales_all_gradients_by_one_factor():
    model = model_with_gradients(0)
    before = flat(model)
    norm = FixedNorm(0.5).step(model)
    assert norm.shape == () and not norm.requires_grad
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-6)
    torch.testing.assert_close(flat(model), before * (0.5 / (before.norm() + 1e-6)), rtol=1e-6, atol=0)


def test_norms_below_the_threshold_leave_gradients_bitwise_equal():
    model = model_with_gradients(0)
    before = flat(model)
    FixedNorm(1e3).step(model)
    assert torch.equal(flat(model), before)


def test_warmup_clips_by_max_grad_norm_only():
    zclip = ZClip(warmup_steps=3, max_grad_norm=1.0)
    for seed in range(3):
        model = model_with_gradients(seed)
        zclip.step(model)
        assert float(flat(model).norm()) == pytest.approx(1.0, rel=1e-5)
    assert float(zclip.state["mean"]) > 2, "the statistics take the raw norms"


def test_repeated_parameters_count_once():
    a, b = model_with_gradients(0), model_with_gradients(1)
    expected = float(torch.cat([flat(a), flat(b)]).norm())
    assert float(NoClipping().step(a, b)) == pytest.approx(expected, rel=1e-6)
    assert float(NoClipping().step([a, a], list(b.parameters()))) == pytest.approx(expected, rel=1e-6)


def test_named_parameters_are_rejected():
    with pytest.raises(TypeError, match=r"'0\.weight' is not a parameter"):
        NoClipping().step(dict(model_with_gradients(0).named_parameters()))
    assert float(NoClipping().step(model_with_gradients(0), optimizer=None)) > 0


GRADIENTS = {
    "random": lambda: torch.randn(1001, 1003),
    "constant": lambda: torch.full((1 << 21,), 0.1003),  # all errors of a sum in float32 have one sign
    "transposed": lambda: torch.randn(1000, 30).t(),
    "every-other": lambda: torch.randn(3000, 2)[:, 0],
    "one-row": lambda: torch.randn(512),
    "scalar": lambda: torch.tensor(-3.0),
    "empty": lambda: torch.zeros(0, 5),
    "float16": lambda: torch.full((1 << 19,), 10.0).half(),
    "float16-tiny": lambda: torch.full((100_000,), 1e-7).half(),
    "bfloat16": lambda: torch.randn(700, 1001).bfloat16(),
    "bfloat16-tiny": lambda: torch.randn(10_000).bfloat16() * 1e-25,
    "float32-tiny": lambda: torch.randn(10_000) * 1e-30,
    "float32-large": lambda: torch.randn(10_000) * 1e16,
    "float64": lambda: torch.randn(10_000).double() * 1e100,
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", [NoClipping, AdaGC])
def test_norm_on_a_cpu_is_the_float64_norm(make, gradient):
    torch.manual_seed(0)
    g = GRADIENTS[gradient]()
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g
    expected = float(torch.linalg.vector_norm(g.double()))
    strategy = make()
    strategy.step([p])
    assert strategy.read_telemetry()["grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_norm_does_not_depend_on_how_a_gradient_is_split():
    torch.manual_seed(0)
    gradient = torch.randn(3_000_001)
    norms = []
    for parts in (1, 2, 7):
        parameters = [nn.Parameter(torch.zeros_like(part)) for part in gradient.chunk(parts)]
        for p, part in zip(parameters, gradient.chunk(parts), strict=True):
            p.grad = part
        norms.append(float(NoClipping().step(parameters)))
    assert norms == pytest.approx([norms[0]] * 3, rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, value", [(10_000, 6e4), (2_000_000, 3e4), (1000, 0.1003)])
def test_scaled_half_precision_gradients_are_rounded_once(dtype, n, value):
    """A coefficient in half precision would be 0, or 7 % too large; a product is off by half a digit at most."""
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    p.grad = torch.full_like(p, value)
    FixedNorm(1.0).step([p])
    assert float(p.grad[0]) == float(torch.tensor(n**-0.5).to(dtype))
    assert bool((p.grad == p.grad[0]).all())


def test_no_gradients_is_an_error(make):
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        make().step(nn.Linear(2, 2))


def test_restored_strategy_continues_bitwise(make):
    for stop in (0, 2, 5, 17):
        uninterrupted = make()
        for i in range(stop):
            uninterrupted.step(model_with_gradients(i))
        file = io.BytesIO()
        torch.save(uninterrupted.state_dict(), file)
        file.seek(0)
        restored = make()
        restored.load_state_dict(torch.load(file, weights_only=True))
        for i in range(stop, stop + 10):
            a, b = (model_with_gradients(i, 1 + 9 * (i % 7 == 0)) for _ in range(2))
            uninterrupted.step(a)
            restored.step(b)
            assert torch.equal(flat(a), flat(b))


@pytest.mark.parametrize("loaded", [False, True])
def test_autoclip_enlarges_a_full_history(loaded):
    class SmallHistory(AutoClip):
        def initial_state(self, like):
            state = super().initial_state(like)
            assert state["history"].shape == (1024,)
            return {**state, "history": state["history"][:8]}

    clip = SmallHistory(percentile=50)
    if loaded:
        clip.load_state_dict({**clip.state_dict(), "state": {}, "counters": {}, "started": False})
    trace = torch.rand(40, dtype=torch.float64)
    for i, norm in enumerate(trace):
        clip.observe(norm)
        expected = torch.quantile(trace[: i + 1], 0.5)
        assert float(clip.telemetry["threshold"]) == pytest.approx(float(expected), rel=1e-12)
        assert clip.state["history"].shape == (8 if i < 8 else 16 if i < 16 else 32 if i < 32 else 64,)
        if i in (7, 8, 31):
            saved, clip = clip.state_dict(), SmallHistory(percentile=50)
            clip.load_state_dict(saved)


def test_load_state_dict_rejects_another_strategy_config_or_version():
    with pytest.raises(ValueError, match="state of FixedNorm"):
        ZClip().load_state_dict(FixedNorm().state_dict())
    with pytest.raises(ValueError, match=r"alpha=0\.9, not 0\.97"):
        ZClip().load_state_dict(ZClip(alpha=0.9).state_dict())
    newer = {**ZClip().state_dict(), "version": 99}
    with pytest.raises(ValueError, match="version 99"):
        ZClip().load_state_dict(newer)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 1.0}, {"alpha": -0.1}, {"z_thresh": 0}, {"eps": 0}, {"warmup_steps": 0},
        {"warmup_steps": 10**30}, {"mode": "median"},
        {"clip_option": "min"}, {"clip_factor": 0}, {"max_grad_norm": -1},
    ],
)  # fmt: skip
def test_bad_arguments_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^{name}={value} is not allowed: it must be ") as error:
        ZClip(**settings)
    for raised in (error.value, pickle.loads(pickle.dumps(error.value))):
        assert str(raised) == f"{raised.field}={raised.value} {raised.problem}" and raised.field == name


def test_custom_strategy_needs_one_method():
    class Halve(ClippingStrategy):
        """Clip every norm to half of itself."""

        def decide(self, norm, state):
            return Decision(norm / 2, state)

    model = model_with_gradients(0)
    before = flat(model)
    strategy = Halve()
    strategy.step(model)
    torch.testing.assert_close(flat(model), before / 2, rtol=1e-5, atol=0)
    copy.deepcopy(strategy).load_state_dict(strategy.state_dict())


def test_step_reads_no_value_from_an_accelerator(make):
    """On the meta device reading any value raises."""
    strategy = make()
    model = nn.Linear(4, 4, device="meta")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        assert strategy.step(model).device.type == "meta"


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_statistics_lie_on_the_device_of_the_gradients(make, device):
    strategy, parameters = make(), [nn.Parameter(torch.ones(3, 2, device=device)) for _ in range(2)]
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        strategy.step(parameters, loss=torch.ones((), device=device))
    tensors = {**strategy.state, **strategy.counters, **strategy.telemetry}
    assert {value.device.type for value in tensors.values()} == {device}
    for key, value in {**strategy.state, **strategy.counters}.items():
        counts = key.endswith(("count", "clips", "nonfinite", "block_spikes"))
        assert value.dtype == (torch.int64 if counts else torch.float64), key
    scalars = {key: value for key, value in tensors.items() if key not in strategy.state or not strategy.per_tensor}
    assert {key for key, value in scalars.items() if value.ndim} <= {"history", "blocks", "losses", "norms"}
    measured = {"grad_norm", "clipped_norm", "mean", "std", "z", "threshold"} & strategy.telemetry.keys()
    assert {strategy.telemetry[key].dtype for key in measured} == {torch.float64}


class WithoutAttribute(ClippingStrategy):
    def __init__(self, factor=2.0):
        super().__init__()

    def decide(self, norm, state):
        return Decision(norm, state)


class WithoutSuperInit(ClippingStrategy):
    def __init__(self):
        self.mine = 1


class ReturnsTensor(ClippingStrategy):
    def decide(self, norm, state):
        return norm


class ReturnsUnknownStatistic(ClippingStrategy):
    def decide(self, norm, state):
        return Decision(norm, {"mean": norm})


class NumberAsStatistic(ClippingStrategy):
    def initial_state(self, like):
        return {"mean": 0.0}


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            WithoutAttribute,
            "WithoutAttribute must keep its argument factor as an attribute of that name: a saved state records it",
        ),
        (WithoutSuperInit, "WithoutSuperInit.__init__ must call super().__init__()"),
        (ReturnsTensor, "ReturnsTensor.decide must return a Decision, not Tensor"),
        (
            ReturnsUnknownStatistic,
            "ReturnsUnknownStatistic.initial_state must return all of the statistics: it lacks mean",
        ),
        (NumberAsStatistic, "NumberAsStatistic.initial_state must return tensors: mean is 0.0"),
    ],
)
def test_mistakes_in_a_custom_strategy_raise_at_its_first_step(strategy, message):
    with pytest.raises((TypeError, ValueError)) as error:
        strategy().step(model_with_gradients(0))
    assert str(error.value) == message


def test_other_types_and_sparse_or_complex_gradients_are_rejected():
    model = model_with_gradients(0)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="not SGD; an optimizer goes into optimizer="):
        ZClip().step(model, optimizer)
    with pytest.raises(TypeError, match="not NoneType"):
        ZClip().step(None)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of a parameter of shape \(5, 3\) is sparse: it must be dense"):
        ZClip().step(embedding)
    rows = nn.Parameter(torch.eye(3).to_sparse_csr())
    rows.grad = torch.eye(3).to_sparse_csr()
    with pytest.raises(TypeError, match=r"shape \(3, 3\) is sparse: it must be dense"):
        ZClip().step(rows)
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.abs().sum().backward()
    with pytest.raises(TypeError, match="is complex"):
        ZClip().step(wave)


@pytest.mark.parametrize("value", [True, "0.5", 1j, np.ones(1), torch.ones(2), torch.ones((), dtype=torch.complex64)])
def test_loss_and_norm_are_one_number(value):
    strategy = SkipStep()
    for call in (
        lambda: strategy.step(model_with_gradients(0), loss=value),
        lambda: strategy.observe(torch.ones(()), loss=value),
        lambda: strategy.observe(value),
    ):
        with pytest.raises(TypeError, match=r"^(loss|norm)= takes a real number or a 0-dim real tensor, not [a-zT]+"):
            call()
    strategy.step(model_with_gradients(0), loss=torch.ones(1))
    strategy.observe(torch.ones(1))
    assert strategy.state["loss_count"] == 1 and strategy.state["norm_count"] == 2


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, int, np.int64, Fraction])
def test_number_is_observed_as_a_tensor_of_it_on_the_cpu(kind):
    strategy, expected = SkipStep(sigma=2.0, window=4), SkipStep(sigma=2.0, window=4)
    rule, expected_rule = UpdateClip(window=4), UpdateClip(window=4)
    for number in (1, 2, 1, 2, 40):
        tensor = torch.tensor(float(number), dtype=torch.float64)
        with torch.device("meta"):  # the default device has no say
            coefficient, scale = strategy.observe(kind(number), kind(number + 1)), rule.observe(kind(number))
        assert torch.equal(coefficient, expected.observe(tensor, tensor + 1)) and coefficient.device.type == "cpu"
        assert torch.equal(scale, expected_rule.observe(tensor))
    assert coefficient == 0 and same(strategy.state_dict(), expected.state_dict())
    strategy.observe(math.nan, math.inf)
    assert strategy.counters["nonfinite"] == 1 and strategy.state["loss_count"] == 5


def test_loss_of_a_step_may_be_a_number():
    strategy, expected = SkipStep(), SkipStep()
    strategy.step(model_with_gradients(0), loss=0.5)
    expected.step(model_with_gradients(0), loss=torch.tensor(0.5))
    assert same(strategy.state_dict(), expected.state_dict()) and strategy.state["loss_count"] == 1


class Lagging(ClippingStrategy):
    """Clips to twice the norm of two steps before: returns one statistic under the name of another."""

    def initial_state(self, like):
        like = like + torch.inf
        return {"last": like, "before": like}

    def decide(self, norm, state):
        return Decision(2 * state["before"], {"last": norm, "before": state["last"]}, {"before": state["before"]})


@pytest.mark.parametrize("make", OF_NORMS.values(), ids=OF_NORMS)
def test_norm_below_zero_counts_as_not_finite(make):
    strategy, expected = make(), make()
    for norm in (1.0, 2.0, -1.0, 3.0):
        strategy.observe(torch.tensor(norm))
        expected.observe(torch.tensor(norm if norm > 0 else torch.nan))
    assert same(strategy.state_dict(), expected.state_dict()) and int(strategy.counters["nonfinite"]) == 1


def test_statistics_may_alias_each_other():
    strategy, results = Lagging(), []
    for norm in (1.0, 1.0, 10.0, 10.0, 10.0):
        strategy.observe(torch.tensor(norm, dtype=torch.float64))
        results.append((strategy.read_telemetry()["clipped_norm"], strategy.read_telemetry()["before"]))
    inf = float("inf")
    assert results == [(1, inf), (1, inf), (pytest.approx(2), 1), (pytest.approx(2), 1), (10, 10)]


@pytest.mark.parametrize("make", [AdaGC, AGC, GradientStabilizer, SkipStep, FixedNorm, AutoClip, NoClipping])
def test_only_supporting_strategies_accept_max_grad_norm(make):
    with pytest.raises(TypeError, match="max_grad_norm"):
        make(max_grad_norm=0.5)


def test_telemetry_counts_clips_and_their_cause():
    zclip = ZClip(warmup_steps=3, max_grad_norm=5.0)
    rows = []
    for norm in (1.0, 1.1, 0.9, 1.0, 100.0, float("nan"), 90.0, 1.0, 6.0):
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
        read = zclip.read_telemetry()
        rows.append((read["clipped"], read["clipped_by_max"], read["spike"], read["consecutive_clips"]))
    assert rows[4:8] == [(1, 0, 1, 1), (1, 0, 0, 1), (1, 0, 1, 2), (0, 0, 0, 0)]
    assert zclip.read_telemetry()["nonfinite"] == 1
    bounded = ZClip(warmup_steps=50, max_grad_norm=5.0)
    bounded.observe(torch.tensor(6.0))
    read = bounded.read_telemetry()
    assert (read["clipped"], read["clipped_by_max"], read["spike"]) == (1, 1, 0)


def test_half_precision_gradients_accept_coefficients_beyond_their_range():
    model = nn.Linear(2, 2).half()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e-6)
    GradientStabilizer().step(model)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert float(torch.cat([p.grad.flatten().float() for p in model.parameters()]).norm()) == pytest.approx(
        2**0.5, rel=0.01
    )


def test_agc_clips_huge_float64_gradients():
    model = nn.Linear(3, 2).double()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    AGC().step(model)
    assert all((p.grad > 0).all() and torch.isfinite(p.grad).all() for p in model.parameters())


def test_numpy_numbers_and_tuples_are_saved_as_plain_types(tmp_path):
    class Pair(NoClipping):
        def __init__(self, betas=(0.9, 0.99)):
            super().__init__()
            self.betas = betas

    for strategy in (ZClip(alpha=np.float64(0.9)), Pair()):
        torch.save(strategy.state_dict(), tmp_path / "s.pt")
        strategy.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
        strategy.load_state_dict(
            json.loads(json.dumps({**strategy.state_dict(), "state": {}, "counters": {}, "started": False}))
        )


def test_load_state_dict_rejects_a_damaged_state():
    zclip = ZClip()
    zclip.step(model_with_gradients(0))
    state = zclip.state_dict()
    for key in ("state", "counters"):
        short = {**state, key: dict(list(state[key].items())[1:])}
        wide = {**state, key: {name: torch.ones(2) for name in state[key]}}
        for damaged in (short, wide):
            with pytest.raises(ValueError, match=r"^the saved ZClip is damaged: "):
                zclip.load_state_dict(damaged)
    assert zclip.state["count"] == 1, "a rejected state changes nothing"
    float32 = {name: value.float() for name, value in state["state"].items() if value.is_floating_point()}
    zclip.load_state_dict({**state, "state": {**state["state"], **float32}})
    assert zclip.state["mean"].dtype == torch.float64


def test_prepare_keeps_statistics_and_rejects_meta_parameters():
    strategy, model = AdaGC(), model_with_gradients(0)
    for single in (ZClip(), AdaGC()):
        single.prepare(nn.Parameter(torch.ones(3)))
        shape = (1,) if single.per_tensor else ()
        assert single.state["gamma" if single.per_tensor else "mean"].shape == shape
    with pytest.raises(ValueError, match="prepare"):
        strategy.prepare(nn.Linear(2, 2, device="meta"))
    strategy.prepare(model)
    strategy.step(model)
    strategy.prepare(model)
    assert strategy.state["count"] == 1
    fresh = AdaGC()
    loaded = {**fresh.state_dict(), "started": True}  # the result of loading a distributed checkpoint without prepare
    with pytest.raises(ValueError, match=r"has statistics, but none were loaded: call prepare\(model\) before"):
        fresh.load_state_dict(loaded)
