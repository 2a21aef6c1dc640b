"""What makes a step with thousands of tensors cheap changes no result, and remembers nothing that has changed since."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from tests.helpers import same
from tests.zclip.every_strategy import SHORT
from zclip import AGC, AdaGC, FixedNorm, NoClipping, TensorAutoClip, ZClip
from zclip.apply import scale_
from zclip.cpu_norm import LARGEST, ROW, SMALL, cpu_norms
from zclip.norm import parameters_of
from zclip.tensors import parameter_names
from zclip.updates import pieces, update_norm, update_rms
from zclip.updates.pieces import BUCKET

SIZES = (0, 1, ROW - 1, ROW, ROW + 1, SMALL, SMALL + 1, 3 * SMALL + 7)


def drawn(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + size)).to(dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.up = nn.Linear(2, 3, bias=False)
        self.register_parameter("absent", None)
        self.none = None


def nested() -> nn.Module:
    model = nn.Sequential(Block(), nn.ReLU(), nn.Sequential(Block(), Block()))
    model[2][1].up.weight = model[0].up.weight
    model.append(model[0])
    return model


def backward(model: nn.Module) -> None:
    for seed, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))


def norm_of(parameters) -> float:
    return float(torch.cat([p.grad.flatten() for p in parameters]).norm())


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-12, 1e16])
def test_norms_of_tensors_of_all_sizes_are_the_float64_norms(scale):
    tensors = [drawn(size, dtype) * scale for size in SIZES for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    tensors += [torch.zeros(size) for size in SIZES]
    expected = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
    torch.testing.assert_close(cpu_norms(tensors), expected, rtol=1e-6, atol=0)
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(cpu_norms([tensors[i] for i in order]), cpu_norms(tensors)[order])


@pytest.mark.parametrize("size", [1, ROW, SMALL, 2 * SMALL])
def test_norms_beyond_the_squares_of_float32_are_infinite(size):
    huge = torch.full((size,), 2 * LARGEST)
    assert cpu_norms([huge, huge.double(), torch.full((size,), torch.nan)]).isfinite().tolist() == [False, True, False]


def mixed_optimizer(amsgrad: bool) -> torch.optim.Optimizer:
    """Return an optimizer after a step, with tensors of several shapes, dtypes and orders in memory."""
    shapes = [(), (0,), (0, 3), (1,), (7,), (4, 5), (2, 3, 4), (BUCKET + 3,)]
    weights = [drawn(math.prod(shape), torch.float32, i).view(shape) for i, shape in enumerate(shapes)]
    weights += [weights[5].t(), weights[5].bfloat16(), weights[5].double(), drawn(48, torch.float32).view(2, 2, 3, 4)]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    parameters = [nn.Parameter(weight.clone(memory_format=torch.preserve_format)) for weight in weights]
    optimizer = torch.optim.AdamW(parameters, amsgrad=amsgrad)
    for seed in (1, 2):
        for i, p in enumerate(parameters):
            p.grad = drawn(p.numel(), p.dtype, seed * 100 + i).view(p.shape)
        if seed == 1:
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("measure", [update_norm, update_rms])
def test_tensors_that_are_pieces_as_they_are_have_the_same_updates_as_flattened_ones(measure, amsgrad, monkeypatch):
    optimizer = mixed_optimizer(amsgrad)
    found = measure(optimizer)
    monkeypatch.setattr(pieces, "_is_ready", lambda tensor: False)
    assert torch.equal(found, measure(optimizer)) and found.isfinite().all()


@pytest.mark.parametrize("measure", [update_norm, update_rms])
def test_small_tensors_are_not_flattened_to_measure_their_updates(measure, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        backward(model)
        optimizer.step()
    flattened = []
    monkeypatch.setattr(pieces, "_flat", lambda tensor: flattened.append(tensor) or tensor.detach().reshape(-1))
    assert measure(optimizer).isfinite().all() and not flattened


def test_parameters_have_the_order_of_the_module():
    model = nested()
    assert [id(shard.parameter) for shard in parameters_of(model)] == [*map(id, model.parameters())]
    model.to(torch.complex64)
    model[0].scale = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    assert id(model[0].scale) not in {id(shard.parameter) for shard in parameters_of(model)}


def test_names_are_the_first_ones_of_each_parameter():
    model = nested()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    assert parameter_names(model) == {key: min(each) for key, each in names.items()}


def test_parameters_of_a_scripted_module_are_found():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1))))
    assert len(parameters_of(scripted)) == 4
    assert {*parameter_names(scripted).values()} == {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}


@pytest.mark.parametrize("attached", [False, True])
def test_next_step_sees_what_has_changed_in_the_model(attached):
    """Nothing about parameters, names or the scope is kept from one step to the next."""
    model = nested()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    strategy = NoClipping(scope=["*.weight"])
    if attached:
        strategy.attach(optimizer, model)

    def measured() -> float:
        backward(model)
        if not attached:
            strategy.step(model)
        optimizer.step()
        return strategy.read_telemetry()["grad_norm"]

    def expected(pattern: str) -> float:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return norm_of(p for name, p in model.named_parameters() if pattern in name and (id(p) in held or not attached))

    assert measured() == pytest.approx(expected("weight"), rel=1e-6)
    strategy.scope = "*.bias"
    assert measured() == pytest.approx(expected("bias"), rel=1e-6)
    model[2][0].extra = nn.Linear(2, 2)
    optimizer.add_param_group({"params": list(model[2][0].extra.parameters())})
    assert measured() == pytest.approx(expected("bias"), rel=1e-6)
    model[2][0].extra.bias = None
    optimizer.param_groups[-1]["params"].pop()
    assert measured() == pytest.approx(expected("bias"), rel=1e-6)
    strategy.scope = "renamed.*"
    model.renamed = model[2][0].extra
    del model[2][0].extra
    assert measured() == pytest.approx(norm_of(model.renamed.parameters()), rel=1e-6)
    old = model.renamed.weight
    model.renamed.weight = nn.Parameter(torch.ones(5))
    optimizer.param_groups[-1]["params"] = [model.renamed.weight]
    old.grad.fill_(torch.nan)
    assert measured() == pytest.approx(norm_of([model.renamed.weight]), rel=1e-6)


@pytest.mark.parametrize("make", [ZClip, AdaGC, lambda: ZClip(scope="*weight"), AGC])
def test_step_leaves_nothing_of_its_own_to_the_garbage_collector(make):
    strategy, model = make(), nested()
    backward(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    strategy.step(model, optimizer=optimizer)
    optimizer.step()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        strategy.step(model, optimizer=optimizer)
        gc.collect()
        left = {type(item) for item in gc.garbage if str(getattr(item, "__module__", "")).startswith("zclip")}
        assert not left, "objects of other packages are those of earlier tests, whose threads run on"
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    parameter = weakref.ref(model[0].scale)
    del model, optimizer
    gc.collect()
    assert parameter() is None, "the strategy keeps no parameter alive"


def test_products_by_one_are_left_out_and_others_are_not():
    no = torch.tensor(False)
    gradients = [drawn(size, torch.float32) for size in (3, 2 * SMALL, 4)]
    before = [g.clone() for g in gradients]
    versions = [g._version for g in gradients]
    scale_(gradients, torch.tensor(1.0), no)
    scale_(gradients, torch.tensor([1.0, 1.0, 0.5]), no)
    scale_(gradients, [torch.tensor(0.25), torch.ones(2 * SMALL), torch.ones(4)], no)
    assert gradients[1]._version == versions[1], "a large gradient is not written"
    for gradient, original, factor in zip(gradients, before, (0.25, 1.0, 0.5), strict=True):
        assert torch.equal(gradient, original * factor)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_many_small_gradients_are_clipped_like_few_large_ones_of_their_norms(make):
    """Tensors of one shape are measured and clipped together, and each as if it were alone."""
    strategies = [make(), make()]
    for step in range(8):
        gradients = [drawn(64, torch.float32, seed).view(8, 8) * (50 if step == 6 else 1) for seed in (0, 100, 200)]
        small = [nn.Parameter(torch.full((8, 8), 0.1)) for _ in gradients]
        mixed = [nn.Parameter(torch.full((8, 8), 0.1)) for _ in gradients] + [nn.Parameter(torch.zeros(2, SMALL))]
        for p, q, g in zip(small, mixed, gradients, strict=False):
            p.grad, q.grad = g.clone(), g.clone()
        mixed[-1].grad = torch.zeros(2, SMALL)
        strategies[0].step(small)
        strategies[1].step(mixed)
        assert same([p.grad for p in small], [p.grad for p in mixed[:-1]])


@pytest.mark.parametrize("percentile", [0, 12.5, 49, 50, 95, 100])
@pytest.mark.parametrize("window", [2, 3, 8])
def test_percentile_of_a_tensor_is_that_of_its_sorted_history(percentile, window):
    strategy = TensorAutoClip(percentile=percentile, window=window)
    norms: list[list[float]] = [[], []]
    for step in range(4 * window):
        parameters = [nn.Parameter(torch.zeros(1)) for _ in norms]
        for i, p in enumerate(parameters):
            norms[i].append(1 + (7 * step + 3 * i) % 5)
            p.grad = torch.tensor([float(norms[i][-1])])
        strategy.step(parameters)
        for p, history in zip(parameters, norms, strict=True):
            bound = torch.quantile(torch.tensor(history[-window:]).float(), percentile / 100)
            expected = min(history[-1], float(bound)) if len(history) >= window else history[-1]
            assert float(p.grad) == pytest.approx(expected, rel=1e-6)


def test_agc_stacks_tensors_of_one_shape_only():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in [(4, 3), (3, 4), (4, 3), (5,), (), (2, 3, 2), (5,)]]
    alone = [nn.Parameter(p.detach().clone()) for p in parameters]
    for seed, (p, q) in enumerate(zip(parameters, alone, strict=True)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        q.grad = p.grad.clone()
    AGC(ratio=0.05).step(parameters)
    for p, q in zip(parameters, alone, strict=True):
        AGC(ratio=0.05).step([q])
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_frozen_parameters_are_looked_at_in_every_step():
    model = nested()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    strategy = FixedNorm(1e-3)
    for frozen in (False, True, False):
        backward(model)
        for p in model[0].parameters():
            p.requires_grad_(not frozen)
            p.grad = None if frozen else p.grad
        expected = norm_of(p for p in model.parameters() if p.grad is not None)
        strategy.step(model, optimizer=optimizer)
        optimizer.step()
        assert strategy.read_telemetry()["grad_norm"] == pytest.approx(expected, rel=1e-6)
