"""`step` on real gradients: what is scaled, what is refused, what is remembered."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

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


def test_the_norm_is_returned_and_the_gradients_are_scaled_by_one_factor():
    model = model_with_gradients(0)
    before = flat(model)
    norm = FixedNorm(0.5).step(model)
    assert norm.shape == () and not norm.requires_grad
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-6)
    torch.testing.assert_close(flat(model), before * (0.5 / (before.norm() + 1e-6)), rtol=1e-6, atol=0)


def test_small_norms_are_left_alone_to_the_bit():
    model = model_with_gradients(0)
    before = flat(model)
    FixedNorm(1e3).step(model)
    assert torch.equal(flat(model), before)


def test_warmup_clips_by_max_grad_norm_alone():
    zclip = ZClip(warmup_steps=3, max_grad_norm=1.0)
    for seed in range(3):
        model = model_with_gradients(seed)
        zclip.step(model)
        assert float(flat(model).norm()) == pytest.approx(1.0, rel=1e-5)
    assert float(zclip.state["mean"]) > 2, "the statistics take the raw norms"


def test_modules_parameters_and_shared_parameters_count_once():
    a, b = model_with_gradients(0), model_with_gradients(1)
    whole = float(torch.cat([flat(a), flat(b)]).norm())
    assert float(NoClipping().step(a, b)) == pytest.approx(whole, rel=1e-6)
    assert float(NoClipping().step([a, a], list(b.parameters()))) == pytest.approx(whole, rel=1e-6)


def test_names_are_no_parameters():
    with pytest.raises(TypeError, match=r"'0\.weight' is no parameter"):
        NoClipping().step(dict(model_with_gradients(0).named_parameters()))
    assert float(NoClipping().step(model_with_gradients(0), optimizer=None)) > 0


def test_half_precision_norms_are_summed_in_single():
    model = nn.Linear(1000, 1000, bias=False).half()
    model.weight.grad = torch.full_like(model.weight, 10.0)
    assert float(NoClipping().step(model)) == pytest.approx(10_000, rel=1e-4)


def test_no_gradients_is_an_error(make):
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        make().step(nn.Linear(2, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(make, bad):
    disturbed, calm = make(), make()
    for i in range(20):
        if i in (0, 3, 12):
            model = model_with_gradients(100 + i)
            next(model.parameters()).grad[0, 0] = bad
            disturbed.step(model)
            assert torch.equal(flat(model), torch.zeros_like(flat(model)))
        one, other = model_with_gradients(i), model_with_gradients(i)
        disturbed.step(one)
        calm.step(other)
        assert torch.equal(flat(one), flat(other))
    for key in calm.state:
        assert torch.equal(calm.state[key], disturbed.state[key])


def test_a_restored_strategy_goes_on_to_the_last_bit(make):
    for stop in (0, 2, 5, 17):
        whole = make()
        for i in range(stop):
            whole.step(model_with_gradients(i))
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        file.seek(0)
        restored = make()
        restored.load_state_dict(torch.load(file, weights_only=True))
        for i in range(stop, stop + 20):
            a, b = (
                model_with_gradients(i, 1 + 9 * (i % 7 == 0)),
                model_with_gradients(i, 1 + 9 * (i % 7 == 0)),
            )
            whole.step(a)
            restored.step(b)
            assert torch.equal(flat(a), flat(b))


def test_autoclip_goes_on_when_its_history_outgrows_the_buffer():
    clip = AutoClip(percentile=50)
    trace = torch.rand(3000, dtype=torch.float64)
    for i, norm in enumerate(trace):
        clip.observe(norm)
        if i in (1023, 1024, 2999):
            wanted = torch.quantile(trace[: i + 1], 0.5)
            assert float(clip.telemetry["threshold"]) == pytest.approx(float(wanted), rel=1e-12)
            saved, clip = clip.state_dict(), AutoClip(percentile=50)
            clip.load_state_dict(saved)


def test_a_state_of_something_else_is_refused():
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
def test_bad_settings_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^{name}={value} is not allowed: it must be "):
        ZClip(**settings)


def test_a_strategy_of_ones_own_needs_one_method():
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


def test_no_value_is_read_on_an_accelerator(make):
    """On the meta device any attempt to look at a value raises."""
    strategy = make()
    model = nn.Linear(4, 4, device="meta")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        assert strategy.step(model).device.type == "meta"


class Forgetful(ClippingStrategy):
    def __init__(self, factor=2.0):
        super().__init__()

    def decide(self, norm, state):
        return Decision(norm, state)


class Uninitialised(ClippingStrategy):
    def __init__(self):
        self.mine = 1


class WithoutDecision(ClippingStrategy):
    def decide(self, norm, state):
        return norm


class UnknownStatistic(ClippingStrategy):
    def decide(self, norm, state):
        return Decision(norm, {"mean": norm})


class Number(ClippingStrategy):
    def initial_state(self, like):
        return {"mean": 0.0}


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (Forgetful, "Forgetful must keep its argument factor as an attribute of that name"),
        (Uninitialised, r"Uninitialised.__init__ must call super\(\).__init__\(\)"),
        (WithoutDecision, "WithoutDecision.decide must return a Decision, not Tensor"),
        (UnknownStatistic, "UnknownStatistic.initial_state must return all of the statistics: it lacks mean"),
        (Number, r"Number.initial_state must return tensors: mean is 0\.0"),
    ],
)
def test_mistakes_in_a_strategy_of_ones_own_are_told_at_its_first_step(strategy, said):
    with pytest.raises((TypeError, ValueError), match=said):
        strategy().step(model_with_gradients(0))


def test_what_is_no_parameter_or_no_dense_gradient_is_refused():
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
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.abs().sum().backward()
    with pytest.raises(TypeError, match="is complex"):
        ZClip().step(wave)


class Lagging(ClippingStrategy):
    """Clips to twice the norm of two steps before: one statistic becomes another."""

    def initial_state(self, like):
        like = like + torch.inf
        return {"last": like, "before": like}

    def decide(self, norm, state):
        return Decision(2 * state["before"], {"last": norm, "before": state["last"]}, {"before": state["before"]})


def test_a_statistic_may_move_into_another():
    strategy, seen = Lagging(), []
    for norm in (1.0, 1.0, 10.0, 10.0, 10.0):
        strategy.observe(torch.tensor(norm, dtype=torch.float64))
        seen.append((strategy.read_telemetry()["clipped_norm"], strategy.read_telemetry()["before"]))
    inf = float("inf")
    assert seen == [(1, inf), (1, inf), (pytest.approx(2), 1), (pytest.approx(2), 1), (10, 10)]


@pytest.mark.parametrize("make", [AdaGC, AGC, GradientStabilizer, SkipStep, FixedNorm, AutoClip, NoClipping])
def test_a_bound_is_taken_by_those_that_keep_it(make):
    with pytest.raises(TypeError, match="max_grad_norm"):
        make(max_grad_norm=0.5)


def test_telemetry_counts_clips_and_tells_by_what():
    zclip = ZClip(warmup_steps=3, max_grad_norm=5.0)
    told = []
    for norm in (1.0, 1.1, 0.9, 1.0, 100.0, float("nan"), 90.0, 1.0, 6.0):
        zclip.observe(torch.tensor(norm, dtype=torch.float64))
        read = zclip.read_telemetry()
        told.append((read["clipped"], read["clipped_by_max"], read["spike"], read["consecutive_clips"]))
    assert told[4:8] == [(1, 0, 1, 1), (1, 0, 0, 1), (1, 0, 1, 2), (0, 0, 0, 0)]
    assert zclip.read_telemetry()["nonfinite"] == 1
    loud = ZClip(warmup_steps=50, max_grad_norm=5.0)
    loud.observe(torch.tensor(6.0))
    read = loud.read_telemetry()
    assert (read["clipped"], read["clipped_by_max"], read["spike"]) == (1, 1, 0)


def test_half_precision_gradients_are_scaled_by_more_than_they_can_hold():
    model = nn.Linear(2, 2).half()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e-6)
    GradientStabilizer().step(model)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert float(torch.cat([p.grad.flatten().float() for p in model.parameters()]).norm()) == pytest.approx(
        2**0.5, rel=0.01
    )


def test_float64_gradients_of_any_size_are_clipped_by_unit():
    model = nn.Linear(3, 2).double()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    AGC().step(model)
    assert all((p.grad > 0).all() and torch.isfinite(p.grad).all() for p in model.parameters())


def test_numbers_of_numpy_and_tuples_are_saved_plainly(tmp_path):
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


def test_a_damaged_state_is_refused():
    zclip = ZClip()
    zclip.step(model_with_gradients(0))
    state = zclip.state_dict()
    for key in ("state", "counters"):
        short = {**state, key: dict(list(state[key].items())[1:])}
        wide = {**state, key: {name: torch.ones(2) for name in state[key]}}
        for damaged in (short, wide):
            with pytest.raises(ValueError, match="the saved ZClip is damaged: its statistics differ in"):
                zclip.load_state_dict(damaged)
    assert zclip.state["count"] == 1, "what is refused changes nothing"
    narrow = {
        **state,
        "state": {name: value.to(torch.float32) for name, value in state["state"].items() if name != "count"},
    }
    narrow["state"]["count"] = state["state"]["count"]
    zclip.load_state_dict(narrow)
    assert zclip.state["mean"].dtype == torch.float64


def test_prepare_keeps_what_is_there_and_wants_real_parameters():
    strategy, model = AdaGC(), model_with_gradients(0)
    with pytest.raises(ValueError, match="prepare"):
        strategy.prepare(nn.Linear(2, 2, device="meta"))
    strategy.prepare(model)
    strategy.step(model)
    strategy.prepare(model)
    assert strategy.state["count"] == 1
    fresh = AdaGC()
    loaded = {**fresh.state_dict(), "started": True}  # what a distributed checkpoint makes of it without prepare
    with pytest.raises(ValueError, match=r"has statistics, but none were loaded: call prepare\(model\) before"):
        fresh.load_state_dict(loaded)
