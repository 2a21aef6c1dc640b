"""Decisions folded into a fused optimizer do what scaled gradients do, and skipped steps do nothing at all."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.conftest import same
from zclip import AdaGC, FixedNorm, SkipStep, ZClip

FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, fused=True),
}
PLAIN = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}
FLOWS = ["plain", "closure", "scaler", "scaler and accumulation"]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def batch(step: int, bad: frozenset[int] = frozenset()) -> torch.Tensor:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return x * float("nan") if step in bad else x * (50 if step in (12, 19) else 1)


def train(make, strategy, flow="plain", fold=True, steps=25, bad=frozenset()) -> nn.Module:
    model = build()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5, enabled="scaler" in flow)
    parts = 2 if "accumulation" in flow else 1
    given = {"optimizer": optimizer} if fold else {}
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            for part in batch(step, bad).chunk(parts):
                loss = model(part).square().mean() / parts
                scaler.scale(loss).backward()
            if "scaler" in flow:
                scaler.unscale_(optimizer)
            strategy.step(model, loss=loss, **given)
            return loss

        if flow == "closure":
            optimizer.step(closure)
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()
    return model


def assert_same(one: nn.Module, other: nn.Module, rtol: float = 2e-5) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("strategy", [lambda: ZClip(warmup_steps=5), lambda: FixedNorm(0.05), AdaGC])
def test_folded_clipping_is_clipping(name, flow, strategy):
    folded = train(FUSED[name], strategy(), flow)
    scaled = train(FUSED[name], strategy(), flow, fold=False)
    assert_same(folded, scaled)
    unclipped = train(FUSED[name], FixedNorm(1e9), flow)
    assert any(
        not torch.allclose(p, q, rtol=1e-3) for p, q in zip(folded.parameters(), unclipped.parameters(), strict=True)
    )


def test_gradients_of_a_folded_step_are_not_touched_before_it():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    model(batch(0)).square().mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    FixedNorm(1e-3).step(model, optimizer=optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf"), "nothing is left over"


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("make", [*FUSED.values(), *PLAIN.values()], ids=[*FUSED, *(f"plain {n}" for n in PLAIN)])
@pytest.mark.parametrize("why", ["nan", "inf", "skip-step"])
def test_a_skipped_step_does_nothing(make, why):
    model = build()
    optimizer = make(model.parameters())
    strategy = SkipStep(sigma=6, window=8) if why == "skip-step" else ZClip(warmup_steps=3)
    for step in range(10):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        if step == 9:
            if why == "skip-step":
                for p in model.parameters():
                    p.grad.mul_(1e4)
            else:
                model[0].weight.grad[0, 0] = float(why)
            before = snapshot(model, optimizer)
        strategy.step(model, optimizer=optimizer)
        optimizer.step()
    assert same(before, snapshot(model, optimizer))
    optimizer.zero_grad()
    model(batch(11)).square().mean().backward()
    strategy.step(model, optimizer=optimizer)
    optimizer.step()
    assert not same(before[0], model.state_dict()), "the step after goes on"


@pytest.mark.parametrize("flow", FLOWS[:2])
def test_training_with_bad_batches_is_training_without_them(flow):
    bad = frozenset({2, 7, 8, 20})
    with_bad = train(FUSED["adamw"], ZClip(warmup_steps=5), flow, bad=bad)
    model, strategy = build(), ZClip(warmup_steps=5)
    optimizer = FUSED["adamw"](model.parameters())
    for step in range(25):
        if step not in bad:
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            strategy.step(model, optimizer=optimizer)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(with_bad.parameters(), model.parameters(), strict=True))


def test_an_optimizer_with_other_parameters_gets_scaled_gradients():
    one, other = build(), build()
    both = torch.optim.AdamW([*one.parameters(), *other.parameters()], fused=True)
    for model in (one, other):
        model(batch(0)).square().mean().backward()
    theirs = [p.grad.clone() for p in other.parameters()]
    FixedNorm(1e-3).step(one, optimizer=both)
    assert torch.cat([p.grad.flatten() for p in one.parameters()]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert all(torch.equal(p.grad, g) for p, g in zip(other.parameters(), theirs, strict=True))


def test_frozen_parameters_in_the_optimizer_change_nothing():
    model = build()
    model[0].weight.requires_grad_(False)
    for make in (FUSED["adamw"], PLAIN["adamw"]):
        optimizer = make(model.parameters())
        strategy = ZClip()
        optimizer.zero_grad()
        model(batch(0)).square().mean().backward()
        model[2].bias.grad[0] = float("nan")
        before = copy.deepcopy(model.state_dict())
        strategy.step(model, optimizer=optimizer)
        optimizer.step()
        assert same(before, model.state_dict())


def test_two_optimizers_share_one_norm_and_one_update_of_the_statistics():
    models, optimizers = (build(), build()), []
    for model, make in zip(models, (FUSED["adamw"], PLAIN["sgd"]), strict=True):
        optimizers.append(make(model.parameters()))
    zclip = ZClip()
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
        norm = zclip.step(*models, optimizer=optimizers)
        wanted = torch.cat([p.grad.flatten() for model in models for p in model.parameters()]).norm()
        assert float(norm) == pytest.approx(float(wanted), rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert int(zclip.state["count"]) == 4


def stepped(optimizer, model) -> torch.Tensor:
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def backward(model, optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    model(batch(step)).square().mean().backward()


def test_a_decision_whose_step_never_came_is_forgotten():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    clip = FixedNorm(0.01)
    backward(model, optimizer, 12)
    clip.step(model, optimizer=optimizer)
    backward(model, optimizer)
    clip.step(model)
    assert float(stepped(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_two_strategies_for_one_step_are_refused():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    backward(model, optimizer)
    one, other = FixedNorm(0.01), FixedNorm(0.01)
    one.step(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="two strategies clip for one optimizer"):
        other.step(model, optimizer=optimizer)
    assert float(stepped(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_skipped_first_step_leaves_no_garbage_in_the_momentum():
    for _ in range(3):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        zclip = ZClip()
        backward(model, optimizer)
        model[0].weight.grad[0, 0] = float("nan")
        zclip.step(model, optimizer=optimizer)
        assert not stepped(optimizer, model).any()
        backward(model, optimizer)
        norm = zclip.step(model, optimizer=optimizer)
        assert float(stepped(optimizer, model).norm()) == pytest.approx(0.1 * float(norm), rel=1e-4)


def test_copies_and_pickles_clip_for_themselves():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    clip = FixedNorm(0.01)
    backward(model, optimizer)
    clip.step(model, optimizer=optimizer)
    optimizer.step()
    for other in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        backward(model, optimizer)
        other.step(model, optimizer=optimizer)
        optimizer.step()
        assert not hasattr(optimizer, "grad_scale")


def test_a_scaler_goes_on_after_a_step_without_it():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    clip, scaler = FixedNorm(0.01), torch.amp.GradScaler("cpu")
    backward(model, optimizer)
    clip.step(model, optimizer=optimizer)
    optimizer.step()
    optimizer.zero_grad()
    scaler.scale(model(batch(1)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_zero_is_for_norms_that_are_not_finite_and_nothing_else(fused):
    """A step that the rule skips does not happen under "zero" either."""
    model, strategy = build(), SkipStep(sigma=2.0, window=8, on_nonfinite="zero")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    moved = []
    for step in range(14):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        if step == 10:
            model[0].weight.grad[0, 0] = torch.nan
        before = model[0].weight.detach().clone()
        strategy.step(model, optimizer=optimizer)
        optimizer.step()
        moved.append(not torch.equal(before, model[0].weight))
    assert strategy.read_telemetry()["nonfinite"] == 1 and moved[10], "decay and moments move the weights"
    assert not moved[12] and all(moved[:12]) and moved[13]


def test_a_scaler_does_not_undo_a_skip():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    scaler, strategy = torch.amp.GradScaler("cpu", init_scale=1024.0), SkipStep(sigma=2.0, window=8)
    for step in range(13):
        optimizer.zero_grad()
        scaler.scale(model(batch(step)).square().mean()).backward()
        scaler.unscale_(optimizer)
        strategy.step(model, optimizer=optimizer)
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
    assert strategy.read_telemetry()["skipped"] and torch.equal(before, model[0].weight)


def test_a_decision_of_a_strategy_that_is_gone_makes_way():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    for _ in range(2):  # the optimizer does not step in between, as in an interrupted notebook cell
        model.zero_grad()
        model(batch(0)).square().mean().backward()
        strategy = FixedNorm(0.05)
        strategy.step(model, optimizer=[optimizer, optimizer])
        assert float(optimizer.grad_scale) > 1
        del strategy


def test_nothing_is_decided_where_one_optimizer_refuses():
    model = build()
    first, second = FUSED["adamw"](model[0].parameters()), FUSED["adamw"](model[2].parameters())
    model(batch(0)).square().mean().backward()
    one, other = FixedNorm(0.05), FixedNorm(0.05)
    one.step(model[2], optimizer=second)
    with pytest.raises(ValueError, match="two strategies clip for one optimizer's step"):
        other.step(model, optimizer=[first, second])
    assert not hasattr(first, "grad_scale")


def test_a_skipped_step_leaves_a_frozen_parameter_with_an_old_gradient():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)).square().mean().backward()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad[0, 0] = torch.nan
    before = model[0].weight.clone()
    FixedNorm(1.0).step(model, optimizer=optimizer)
    optimizer.step()
    assert torch.equal(before, model[0].weight)


def test_a_wrapper_that_reads_gradients_gets_them_clipped():
    class Averaging(torch.optim.SGD):
        """Holds an optimizer, and moves by its own gradients."""

        def __init__(self, inner):
            self.optimizer = inner
            super().__init__(inner.param_groups, lr=0.1)

    model = build()
    wrapper = Averaging(FUSED["adamw"](model.parameters()))
    model(batch(0)).square().mean().backward()
    FixedNorm(0.01).step(model, optimizer=wrapper)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(total) == pytest.approx(0.01, rel=1e-3)


def test_an_old_decision_does_not_clear_another_strategys():
    model, other = build(), build()
    make = lambda m: torch.optim.SGD(m.parameters(), lr=1.0, fused=True)  # noqa: E731
    optimizer, elsewhere = make(model), make(other)
    one, two = FixedNorm(0.01), FixedNorm(0.01)
    backward(model, optimizer)
    one.step(model, optimizer=optimizer)
    optimizer.step()
    backward(model, optimizer)
    backward(other, elsewhere)
    two.step(model, optimizer=optimizer)
    one.step(other, optimizer=elsewhere)
    assert float(stepped(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_refused_step_leaves_no_trace_in_the_statistics():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    model(batch(0)).square().mean().backward()
    one, other = ZClip(max_grad_norm=0.01), ZClip(max_grad_norm=0.01)
    one.step(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="two strategies clip"):
        other.step(model, optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer= takes an optimizer, or several, not int"):
        other.step(model, optimizer=[3])
    assert not other.state


def test_parameters_of_two_optimizers_are_clipped_once():
    model = build()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0, fused=True) for _ in range(2)]
    model(batch(0)).square().mean().backward()
    strategy = FixedNorm(0.01)
    strategy.step(model, optimizer=optimizers)
    for optimizer in optimizers:
        assert float(stepped(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_skip_of_a_strategy_that_is_gone_is_forgotten():
    model = build()
    optimizer = FUSED["adamw"](model.parameters())
    model(batch(0)).square().mean().backward()
    model[0].weight.grad[0, 0] = torch.nan
    gone = FixedNorm(0.05)
    gone.step(model, optimizer=optimizer)
    del gone
    model.zero_grad()
    model(batch(0)).square().mean().backward()
    FixedNorm(0.05).step(model, optimizer=optimizer)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
