"""A strategy that is attached to an optimizer clips as one that is called before each of its steps."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.helpers import SLOW
from tests.zclip.reference_loop import assert_same_weights, build_model
from zclip import AdaGC, FixedNorm, SkipStep, ZClip
from zclip.updates import UpdateClip, UpdateMonitor

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
}
STRATEGIES = {
    "zclip": lambda: ZClip(warmup_steps=5),
    "fixed": lambda: FixedNorm(0.05),
    "adagc": AdaGC,
    "skip": lambda: SkipStep(sigma=3.0, window=8),
}
FLOWS = ["plain", "closure", "closure by name", "scaler", "unscaled before"]


def batch(step: int) -> torch.Tensor:
    """(8, 5) inputs; those of steps 12 and 19 are spikes, and step 15 is not finite."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return x * {12: 50.0, 15: torch.nan, 19: 50.0}.get(step, 1.0)


def train(make_optimizer, strategy, flow: str, attached: bool):
    """Return the model after 25 steps, and the telemetry of each."""
    model = build_model()
    optimizer = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5, enabled=flow in FLOWS[3:])
    telemetry = []
    if attached:
        strategy.attach(optimizer, model)
    for step in range(25):

        def closure(step=step):
            optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            scaler.scale(loss).backward()
            if flow == "unscaled before" or (flow == "scaler" and not attached):
                scaler.unscale_(optimizer)
            if not attached:
                strategy.step(model, optimizer=optimizer, loss=loss if flow.startswith("closure") else None)
            return loss

        if flow == "closure":
            optimizer.step(closure)
        elif flow == "closure by name":
            optimizer.step(closure=closure)
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()
        telemetry.append(strategy.read_telemetry())
    return model, telemetry


def case(name: str, optimizer: str, flow: str):
    fast = (name == "zclip" and optimizer != "fused sgd") or (flow == "closure" and optimizer == "fused adamw")
    return (pytest.param if fast else SLOW)(name, optimizer, flow)


@pytest.mark.parametrize(
    ("name", "optimizer", "flow"), [case(*names) for names in itertools.product(STRATEGIES, OPTIMIZERS, FLOWS)]
)
def test_attached_strategy_clips_as_one_that_is_called(name, optimizer, flow):
    make = STRATEGIES[name]
    model, telemetry = train(OPTIMIZERS[optimizer], make(), flow, attached=True)
    expected, expected_telemetry = train(OPTIMIZERS[optimizer], make(), flow, attached=False)
    assert_same_weights(model, expected, rtol=1e-6, atol=1e-7)
    if flow in FLOWS[:3]:
        assert str(telemetry) == str(expected_telemetry)
    unclipped, _ = train(OPTIMIZERS[optimizer], FixedNorm(1e9), flow, attached=False)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), unclipped.parameters(), strict=True))


def test_detached_strategy_clips_no_more():
    model = build_model()
    optimizer, strategy = torch.optim.SGD(model.parameters(), lr=1.0), FixedNorm(0.01)
    strategy.attach(optimizer)
    model(batch(0)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    strategy.detach()
    strategy.detach()
    optimizer.zero_grad()
    model(batch(1)).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    strategy.step(model)
    assert not all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_optimizer_or_strategy_is_not_attached_twice():
    model = build_model()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=1.0) for _ in range(2))
    strategy = ZClip()
    strategy.attach(optimizer)
    with pytest.raises(ValueError, match=r"^this ZClip is attached already: detach\(\) it, or make one for each$"):
        strategy.attach(other)
    with pytest.raises(ValueError, match=r"^a strategy is attached to this optimizer already: detach\(\) that one"):
        ZClip().attach(optimizer)
    model(batch(0)).square().mean().backward()
    with pytest.raises(ValueError, match=r"^optimizer\.step\(\) calls the strategy that is attached to it: leave out"):
        strategy.step(model)
    with pytest.raises(
        ValueError, match=r"^optimizer\.step\(\) calls the strategy that is attached to it: leave out o"
    ):
        strategy.observe(torch.tensor(1.0))
    assert strategy.state == {}
    with pytest.raises(ValueError, match=r"^a strategy is attached to an optimizer of these: leave out step\(\)"):
        ZClip().step(model, optimizer=optimizer)
    strategy.detach()
    strategy.attach(other)
    with pytest.raises(TypeError, match=r"^attach\(\) takes an optimizer of torch, not Linear$"):
        ZClip().attach(torch.nn.Linear(1, 1))


def test_step_without_gradients_is_no_step_of_the_strategy():
    model, strategy = build_model(), ZClip()
    optimizer = torch.optim.AdamW(model.parameters())
    strategy.attach(optimizer)
    optimizer.step()
    assert strategy.read_telemetry() == {}
    scoped, model = ZClip(scope="0.*"), build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scoped.attach(optimizer, model)
    model[0].requires_grad_(False)
    model(batch(0)).square().mean().backward()
    before = model[2].weight.clone()
    optimizer.step()
    assert scoped.read_telemetry() == {} and not torch.equal(before, model[2].weight)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_state_that_a_checkpoint_creates_is_no_step(lr):
    model, strategy = build_model(), ZClip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    strategy.attach(optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["state"] and strategy.read_telemetry() == {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # of a warm-up
    first = ZClip()
    first.attach(optimizer)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert int(first.state["count"]) == 1


def test_first_step_of_a_wrapper_that_passes_no_closure_by_name_is_clipped():
    model, strategy = build_model(), FixedNorm(0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    strategy.attach(optimizer)
    model(batch(0)).square().mean().backward()
    optimizer.step(closure=None)
    assert strategy.read_telemetry()["clipped"]
    moments = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
    assert float(moments.norm()) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(("fused", "counted"), [(True, 2), (False, 0)])
def test_overflow_of_a_grad_scaler_counts_where_the_step_is_called(fused, counted):
    model, strategy = build_model(), ZClip()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    strategy.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-18)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale((1e3 if step < 2 else 1.0) * model(batch(step)).square().mean()).backward()
        if step < 2:
            model[0].bias.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert int(strategy.state["count"]) == 1 and int(strategy.counters["nonfinite"]) == counted


@pytest.mark.slow
def test_compiled_step_traces_nothing_of_the_library():
    models, graphs = [build_model(), build_model()], []
    for model in models:
        optimizer, strategy, rule = torch.optim.SGD(model.parameters(), lr=0.1), ZClip(warmup_steps=3), UpdateClip(2.0)
        strategy.attach(optimizer)
        rule.attach(optimizer)
        step = optimizer.step
        if model is models[0]:
            torch.compiler.reset()
            step = torch.compile(step, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        for x in map(batch, range(6)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            step()
        assert int(strategy.state["count"]) == int(rule.state["count"]) == 6
    assert len(graphs) == 1, "that of the optimizer"
    assert_same_weights(*models, rtol=1e-6)


def test_optimizer_and_model_are_freed():
    model, strategy = build_model(), ZClip()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # as a LightningModule knows its own
    strategy.attach(model.optimizer, model)
    reference = weakref.ref(model)
    del model, strategy
    gc.collect()
    assert reference() is None


def norm_of(*models: torch.nn.Module) -> float:
    """Return the norm of the gradients of models after the backward of one batch."""
    for model in models:
        model.zero_grad()
        model(batch(0)).square().mean().backward()
    return float(torch.cat([p.grad.flatten() for model in models for p in model.parameters()]).norm())


@pytest.mark.parametrize("with_models", [False, True])
def test_parameters_that_are_added_or_replaced_later_are_clipped(with_models):
    first, later, other = build_model(), build_model(), build_model()
    optimizer, strategy = torch.optim.SGD(first.parameters(), lr=1e-3), FixedNorm(1.0)
    strategy.attach(optimizer, *([first, later, other] if with_models else []))
    for change, models in (
        (lambda: None, [first]),
        (lambda: optimizer.add_param_group({"params": list(later.parameters())}), [first, later]),
        (lambda: optimizer.param_groups[0].update(params=list(other.parameters())), [other, later]),
        (lambda: optimizer.param_groups.pop(), [other]),
    ):
        change()
        expected = norm_of(*models)
        optimizer.step()
        assert strategy.read_telemetry()["grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_an_error_of_the_parameters_comes_in_every_step():
    """Parameters are known to the next step only once they were listed without an error."""
    optimizer, strategy = torch.optim.SGD(build_model().parameters(), lr=1e-3), FixedNorm(1.0)
    strategy.attach(optimizer)
    flattened = torch.nn.Parameter(torch.ones(3))
    flattened._fsdp_flattened = True
    optimizer.add_param_group({"params": [flattened]})
    for _ in range(2):
        with pytest.raises(ValueError, match="FSDP1 shards parameters, and only its module knows how"):
            optimizer.step()


def test_copies_are_not_attached():
    model, strategy = build_model(), ZClip()
    optimizer = torch.optim.AdamW(model.parameters())
    strategy.attach(optimizer)
    copied = copy.deepcopy(strategy)
    model(batch(0)).square().mean().backward()
    copied.step(model)
    optimizer.step()
    assert int(copied.state["count"]) == int(strategy.state["count"]) == 1


def test_statistics_of_tensors_have_the_names_of_the_module():
    model, strategy = build_model(), AdaGC()
    optimizer = torch.optim.AdamW(model.parameters())
    strategy.attach(optimizer, model)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert strategy.state_dict()["names"] == [name for name, _ in model.named_parameters()]


def test_module_that_the_optimizer_does_not_train_is_refused():
    model, strategy = build_model(), AdaGC()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"^the models hold no parameter of the optimizer: give attach\(\) the module"):
        strategy.attach(optimizer, copy.deepcopy(model))
    with pytest.raises(TypeError, match=r"^attach\(\) takes an optimizer of torch, not Sequential$"):
        strategy.attach(model, optimizer)
    strategy.attach(optimizer, model[0], copy.deepcopy(model))


def test_attached_strategy_lives_as_long_as_the_optimizer():
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    FixedNorm(0.01).attach(optimizer)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("processes", "losses"), [(1, 2), (2, 0)])
def test_loss_of_a_closure_counts_in_one_process_only(processes, losses, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    model, strategy = build_model(), SkipStep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(lambda: float(closure()))
    assert int(strategy.state["loss_count"]) == losses
    assert int(strategy.state["norm_count"]) == 2


class SubclassSGD(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flow", ["plain", "closure"])
def test_step_that_calls_that_of_its_base_class_is_clipped_once(flow, fused):
    torch.optim.SGD(build_model().parameters())  # from now on torch calls the hooks in the base class's step too
    model, telemetry = train(lambda p: SubclassSGD(p, lr=0.01, fused=fused), ZClip(warmup_steps=5), flow, True)
    expected, expected_telemetry = train(lambda p: torch.optim.SGD(p, lr=0.01), ZClip(warmup_steps=5), flow, False)
    assert_same_weights(model, expected, rtol=1e-6, atol=1e-7)
    assert telemetry[-1]["nonfinite"] == expected_telemetry[-1]["nonfinite"] == 1


def test_step_after_one_that_raised_is_clipped():
    model, strategy = build_model(), FixedNorm(0.01)
    optimizer = SubclassSGD(model.parameters(), lr=0.01)
    strategy.attach(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert strategy.read_telemetry()["clipped"] == 1


class Scaled(torch.optim.SGD):
    """The argument of its step is no closure."""

    def step(self, factor):
        assert factor == 0.5
        return super().step()


def test_argument_of_a_step_that_is_no_closure_is_passed_on():
    model, strategy = build_model(), FixedNorm(0.01)
    optimizer = Scaled(model.parameters(), lr=0.01)
    strategy.attach(optimizer)
    model(batch(0)).square().mean().backward()
    optimizer.step(0.5)
    assert strategy.read_telemetry()["clipped"] == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_an_optimizer_are_not_clipped_until_a_strategy_is_attached(copied):
    model, strategy, rule = build_model(), FixedNorm(0.01), UpdateMonitor()
    optimizer = torch.optim.AdamW(model.parameters())
    strategy.attach(optimizer)
    rule.attach(optimizer)
    model(batch(0)).square().mean().backward()
    other = copied(optimizer)
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert not strategy.telemetry and not rule.telemetry
    again = FixedNorm(0.01)
    again.attach(other)
    other.step()
    assert again.read_telemetry()["clipped"] == 1 and not strategy.telemetry


class Wrapper(torch.optim.Optimizer):
    """Not an optimizer of its own: torch cannot call hooks in its step."""

    def __init__(self, inner):
        self.inner = inner


def test_wrapper_without_hooks_is_refused():
    with pytest.raises(TypeError, match=r"^attach\(\) takes an optimizer of torch, not Wrapper$"):
        ZClip().attach(Wrapper(torch.optim.SGD(build_model().parameters())))


class Container(torch.optim.Optimizer):
    """Several optimizers as one, as torchtitan's OptimizersContainer: its own step calls each of theirs."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {})

    def step(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


def test_container_of_optimizers_is_clipped_by_one_norm():
    models = [build_model() for _ in range(4)]
    optimizers = [OPTIMIZERS["fused adamw"](model.parameters()) for model in models]
    attached, called = ZClip(warmup_steps=5), ZClip(warmup_steps=5)
    container = Container(*optimizers[:2])
    attached.attach(container)
    for step in range(20):
        for i, model in enumerate(models):
            optimizers[i].zero_grad()
            model(batch(step + i % 2)).square().mean().backward()
        container.step()
        called.step(*models[2:], optimizer=optimizers[2:])
        for optimizer in optimizers[2:]:
            optimizer.step()
        torch.testing.assert_close(attached.telemetry["grad_norm"], called.telemetry["grad_norm"], equal_nan=True)
    for i in (0, 1):
        assert_same_weights(models[i], models[i + 2], rtol=1e-5, atol=1e-6)
    assert attached.read_telemetry()["nonfinite"] > 0
