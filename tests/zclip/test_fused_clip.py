"""Clipping inside a fused optimizer's step equals scaling gradients in place; a skipped step changes nothing."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from tests.helpers import SLOW, same
from tests.zclip.reference_loop import assert_same_weights, build_model
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


def batch(step: int, nan_steps: frozenset[int] = frozenset()) -> torch.Tensor:
    """(8, 5) inputs; those of steps 12 and 19 are spikes."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return x * float("nan") if step in nan_steps else x * (50 if step in (12, 19) else 1)


def train(make, strategy, flow="plain", fused=True, nan_steps=frozenset()) -> nn.Module:
    model = build_model()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5, enabled="scaler" in flow)
    micro_batches = 2 if "accumulation" in flow else 1
    for step in range(25):

        def closure(step=step):
            optimizer.zero_grad()
            for micro_batch in batch(step, nan_steps).chunk(micro_batches):
                loss = model(micro_batch).square().mean() / micro_batches
                scaler.scale(loss).backward()
            if "scaler" in flow:
                scaler.unscale_(optimizer)
            strategy.step(model, loss=loss, optimizer=optimizer if fused else None)
            return loss

        if flow == "closure":
            optimizer.step(closure)
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()
    return model


STRATEGIES = {"zclip": lambda: ZClip(warmup_steps=5), "fixed": lambda: FixedNorm(0.05), "adagc": AdaGC}


def case(strategy: str, name: str, flow: str):
    fast = (strategy, name) == ("zclip", "adamw") or (flow == "plain" and name != "adam")
    return (pytest.param if fast else SLOW)(strategy, name, flow)


@pytest.mark.parametrize(
    ("strategy", "name", "flow"), [case(*names) for names in itertools.product(STRATEGIES, FUSED, FLOWS)]
)
def test_fused_clipping_equals_clipping_in_place(strategy, name, flow):
    make = STRATEGIES[strategy]
    fused = train(FUSED[name], make(), flow)
    in_place = train(FUSED[name], make(), flow, fused=False)
    assert_same_weights(fused, in_place, rtol=2e-5, atol=1e-6)
    unclipped = train(FUSED[name], FixedNorm(1e9), flow)
    assert any(
        not torch.allclose(p, q, rtol=1e-3) for p, q in zip(fused.parameters(), unclipped.parameters(), strict=True)
    )


def test_fused_clipping_leaves_gradients_unchanged_until_the_step():
    model = build_model()
    optimizer = FUSED["adamw"](model.parameters())
    model(batch(0)).square().mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    FixedNorm(1e-3).step(model, optimizer=optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf"), (
        "the attributes are removed after the step"
    )


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("make", [*FUSED.values(), *PLAIN.values()], ids=[*FUSED, *(f"plain {n}" for n in PLAIN)])
@pytest.mark.parametrize("cause", ["nan", "inf", "skip-step"])
def test_skipped_step_changes_nothing(make, cause):
    model = build_model()
    optimizer = make(model.parameters())
    strategy = SkipStep(sigma=6, window=8) if cause == "skip-step" else ZClip(warmup_steps=3)
    for step in range(10):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        if step == 9:
            if cause == "skip-step":
                for p in model.parameters():
                    p.grad.mul_(1e4)
            else:
                model[0].weight.grad[0, 0] = float(cause)
            before = snapshot(model, optimizer)
        strategy.step(model, optimizer=optimizer)
        optimizer.step()
    assert same(before, snapshot(model, optimizer))
    optimizer.zero_grad()
    model(batch(11)).square().mean().backward()
    strategy.step(model, optimizer=optimizer)
    optimizer.step()
    assert not same(before[0], model.state_dict()), "the next step trains"


@pytest.mark.parametrize("flow", FLOWS[:2])
def test_nan_batches_do_not_affect_training(flow):
    nan_steps = frozenset({2, 7, 8, 20})
    with_nan = train(FUSED["adamw"], ZClip(warmup_steps=5), flow, nan_steps=nan_steps)
    model, strategy = build_model(), ZClip(warmup_steps=5)
    optimizer = FUSED["adamw"](model.parameters())
    for step in range(25):
        if step not in nan_steps:
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            strategy.step(model, optimizer=optimizer)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(with_nan.parameters(), model.parameters(), strict=True))


def test_optimizer_with_other_parameters_gets_scaled_gradients():
    one, other = build_model(), build_model()
    both = torch.optim.AdamW([*one.parameters(), *other.parameters()], fused=True)
    for model in (one, other):
        model(batch(0)).square().mean().backward()
    other_gradients = [p.grad.clone() for p in other.parameters()]
    FixedNorm(1e-3).step(one, optimizer=both)
    assert torch.cat([p.grad.flatten() for p in one.parameters()]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert all(torch.equal(p.grad, g) for p, g in zip(other.parameters(), other_gradients, strict=True))


def test_step_is_skipped_with_frozen_parameters_in_the_optimizer():
    model = build_model()
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


def test_two_optimizers_share_one_norm_and_one_update():
    models, optimizers = (build_model(), build_model()), []
    for model, make in zip(models, (FUSED["adamw"], PLAIN["sgd"]), strict=True):
        optimizers.append(make(model.parameters()))
    zclip = ZClip()
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
        norm = zclip.step(*models, optimizer=optimizers)
        expected = torch.cat([p.grad.flatten() for model in models for p in model.parameters()]).norm()
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert int(zclip.state["count"]) == 4


def step_and_diff(optimizer, model) -> torch.Tensor:
    """Step the optimizer; return the change of the weights, flattened."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def backward(model, optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    model(batch(step)).square().mean().backward()


def test_decision_without_a_step_is_dropped():
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    clip = FixedNorm(0.01)
    backward(model, optimizer, 12)
    clip.step(model, optimizer=optimizer)
    backward(model, optimizer)
    clip.step(model)
    assert float(step_and_diff(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_optimizer_gets_only_what_it_needs():
    model = build_model()
    optimizer = FUSED["adamw"](model.parameters())
    backward(model, optimizer)
    FixedNorm(1e9).step(model, optimizer=optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf"), "nothing to clip"
    clip = FixedNorm(0.01)
    norm = clip.step(model, optimizer=optimizer)
    assert float(optimizer.grad_scale) == pytest.approx(float(norm) / 0.01, rel=1e-4)
    assert not hasattr(optimizer, "found_inf")
    del optimizer.grad_scale  # by someone else
    model[0].weight.grad[0, 0] = torch.nan
    clip.step(model, optimizer=optimizer)
    assert (float(optimizer.grad_scale), float(optimizer.found_inf)) == (1.0, 1.0)


def test_two_strategies_for_one_step_are_rejected():
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    backward(model, optimizer)
    one, other = FixedNorm(0.01), FixedNorm(0.01)
    one.step(model, optimizer=optimizer)
    with pytest.raises(ValueError) as error:
        other.step(model, optimizer=optimizer)
    assert str(error.value) == ("two strategies clip for one optimizer's step: give the optimizer to one of them only")
    assert float(step_and_diff(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_skipped_first_step_does_not_corrupt_the_momentum():
    for _ in range(3):
        model = build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        zclip = ZClip()
        backward(model, optimizer)
        model[0].weight.grad[0, 0] = float("nan")
        zclip.step(model, optimizer=optimizer)
        assert not step_and_diff(optimizer, model).any()
        backward(model, optimizer)
        norm = zclip.step(model, optimizer=optimizer)
        assert float(step_and_diff(optimizer, model).norm()) == pytest.approx(0.1 * float(norm), rel=1e-4)


def test_copies_and_pickles_are_independent():
    model = build_model()
    optimizer = FUSED["adamw"](model.parameters())
    clip = FixedNorm(0.01)
    backward(model, optimizer)
    clip.step(model, optimizer=optimizer)
    optimizer.step()
    clip._naming_module = model
    assert clip._monitor._count.known == 0
    for other in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert other._naming_module is None and other._monitor._count.known is None, "objects of the process stay"
        backward(model, optimizer)
        other.step(model, optimizer=optimizer)
        optimizer.step()
        assert not hasattr(optimizer, "grad_scale")


def test_scaler_works_after_a_step_without_it():
    model = build_model()
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
def test_zero_policy_applies_to_nonfinite_norms_only(fused):
    """A step that the rule skips is skipped under "zero" too."""
    model, strategy = build_model(), SkipStep(sigma=2.0, window=8, on_nonfinite="zero")
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


def test_scaler_does_not_undo_a_skip():
    model = build_model()
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


def test_decision_of_a_deleted_strategy_is_replaced():
    model = build_model()
    optimizer = FUSED["adamw"](model.parameters())
    for _ in range(2):  # the optimizer does not step in between, as in an interrupted notebook cell
        model.zero_grad()
        model(batch(0)).square().mean().backward()
        strategy = FixedNorm(0.05)
        strategy.step(model, optimizer=[optimizer, optimizer])
        assert float(optimizer.grad_scale) > 1
        del strategy


def test_conflict_on_one_optimizer_leaves_the_others_unchanged():
    model = build_model()
    first, second = FUSED["adamw"](model[0].parameters()), FUSED["adamw"](model[2].parameters())
    model(batch(0)).square().mean().backward()
    one, other = FixedNorm(0.05), FixedNorm(0.05)
    one.step(model[2], optimizer=second)
    with pytest.raises(ValueError, match="two strategies clip for one optimizer's step"):
        other.step(model, optimizer=[first, second])
    assert not hasattr(first, "grad_scale")


def test_skipped_step_leaves_a_frozen_parameter_with_a_gradient_unchanged():
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)).square().mean().backward()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad[0, 0] = torch.nan
    before = model[0].weight.clone()
    FixedNorm(1.0).step(model, optimizer=optimizer)
    optimizer.step()
    assert torch.equal(before, model[0].weight)


def test_wrapper_that_reads_gradients_gets_clipped_ones():
    class Averaging(torch.optim.SGD):
        """Wraps an optimizer, and steps by the gradients itself."""

        def __init__(self, inner):
            self.optimizer = inner
            super().__init__(inner.param_groups, lr=0.1)

    model = build_model()
    wrapper = Averaging(FUSED["adamw"](model.parameters()))
    model(batch(0)).square().mean().backward()
    FixedNorm(0.01).step(model, optimizer=wrapper)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(total) == pytest.approx(0.01, rel=1e-3)


def test_strategy_does_not_clear_the_decision_of_another():
    model, other = build_model(), build_model()
    make = lambda m: torch.optim.SGD(m.parameters(), lr=1.0, fused=True)  # noqa: E731
    optimizer, other_optimizer = make(model), make(other)
    first, second = FixedNorm(0.01), FixedNorm(0.01)
    backward(model, optimizer)
    first.step(model, optimizer=optimizer)
    optimizer.step()
    backward(model, optimizer)
    backward(other, other_optimizer)
    second.step(model, optimizer=optimizer)
    first.step(other, optimizer=other_optimizer)
    assert float(step_and_diff(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_rejected_step_does_not_change_the_statistics():
    model = build_model()
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
    model = build_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0, fused=True) for _ in range(2)]
    model(batch(0)).square().mean().backward()
    strategy = FixedNorm(0.01)
    strategy.step(model, optimizer=optimizers)
    for optimizer in optimizers:
        assert float(step_and_diff(optimizer, model).norm()) == pytest.approx(0.01, rel=1e-3)


def test_skip_of_a_deleted_strategy_is_dropped():
    model = build_model()
    optimizer = FUSED["adamw"](model.parameters())
    model(batch(0)).square().mean().backward()
    model[0].weight.grad[0, 0] = torch.nan
    deleted = FixedNorm(0.05)
    deleted.step(model, optimizer=optimizer)
    del deleted
    model.zero_grad()
    model(batch(0)).square().mean().backward()
    FixedNorm(0.05).step(model, optimizer=optimizer)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
