"""The norm of an update before the step is that of the step which torch's optimizer then takes."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zclip.updates.pieces
from zclip.updates import update_norm

LR = 0.03


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3), nn.Linear(3, 2)).to(dtype)


def backward(net: nn.Module, step: int, scale: float = 1.0) -> None:
    first = next(net.parameters())
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(first.dtype)
    (scale * net(x).square().mean()).backward()


def moved(optimizer: torch.optim.Optimizer) -> float:
    """Take the step, and return the norm of (p_before - p_after - decay) / lr over all parameters."""
    groups = [(group, [p.detach().clone() for p in group["params"]]) for group in optimizer.param_groups]
    has_gradient = {p: p.grad is not None for group, _ in groups for p in group["params"]}
    optimizer.step()
    total = 0.0
    for group, before in groups:
        decay = group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
        for p, old in zip(group["params"], before, strict=True):
            start = old * (1 - float(group["lr"]) * decay) if has_gradient[p] else old
            total += float(((start - p.detach()) / float(group["lr"])).double().square().sum())
    return total**0.5


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True, betas=(0.5, 0.7), eps=1e-2),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR), fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=LR),
    "adam with a penalty": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.3, maximize=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=True, betas=(0.9, 0.3)),
    "amsgrad fused": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True, betas=(0.9, 0.3), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "sgd with a penalty": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.3, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.4, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "momentum fused": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_norm_is_that_of_the_step_that_follows(make):
    net = model()
    optimizer = make(net.parameters())
    for step in range(6):
        optimizer.zero_grad()
        backward(net, step)
        if step == 3:
            net[2].weight.grad = None  # its counter stays behind
        norm = update_norm(optimizer)
        assert norm.shape == () and norm.dtype == torch.float64
        assert float(norm) == pytest.approx(moved(optimizer), rel=1e-9)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_measuring_changes_nothing(make):
    net = model()
    optimizer = make(net.parameters())
    for step in range(2):
        optimizer.zero_grad()
        backward(net, step)
        before = copy.deepcopy((optimizer.state_dict(), [p.grad for p in net.parameters()], net.state_dict()))
        update_norm(optimizer)
        after = (optimizer.state_dict(), [p.grad for p in net.parameters()], net.state_dict())
        assert str(before) == str(after)
        optimizer.step()


@given(
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    eps=st.floats(1e-12, 1.0),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    frozen=st.booleans(),
)
def test_norm_of_any_adamw_is_that_of_its_step(betas, eps, scales, frozen):
    net = model()
    net[0].requires_grad_(not frozen)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=betas, eps=eps, weight_decay=0.0)
    for step, scale in enumerate(scales):
        optimizer.zero_grad()
        backward(net, step, scale)
        norm = float(update_norm(optimizer))
        assert norm == pytest.approx(moved(optimizer), rel=1e-6)


def test_groups_have_their_own_settings_and_optimizers_are_added_up():
    net = model()
    groups = [
        {"params": net[0].parameters(), "betas": (0.5, 0.6), "lr": 0.1},
        {"params": net[2].parameters(), "eps": 1e-2, "amsgrad": True},
    ]
    first = torch.optim.AdamW(groups, lr=LR)
    second = torch.optim.SGD(net[3].parameters(), lr=LR, momentum=0.9)
    for step in range(4):
        net.zero_grad()
        backward(net, step)
        norm = float(update_norm(first, second))
        assert norm == pytest.approx((moved(first) ** 2 + moved(second) ** 2) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_step_of_lower_precision_has_its_norm_within_rounding(dtype):
    net = model(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=True, weight_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        backward(net, step)
        norm = float(update_norm(optimizer))
        assert norm == pytest.approx(moved(optimizer), rel=1e-5 if dtype == torch.float32 else 0.2)


def test_gradients_that_a_fused_step_unscales_are_unscaled():
    net, other = model(), model()
    optimizers = [torch.optim.AdamW(n.parameters(), lr=LR, fused=True) for n in (net, other)]
    for step in range(3):
        for n, scale in ((net, 1.0), (other, 64.0)):
            n.zero_grad()
            backward(n, step, scale)
        optimizers[1].grad_scale = torch.tensor(64.0)
        norms = [float(update_norm(optimizer)) for optimizer in optimizers]
        assert norms[1] == pytest.approx(norms[0], rel=1e-9)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("bucket", [1, 7, 1 << 17])
def test_norm_does_not_depend_on_the_size_of_buckets(bucket, monkeypatch):
    expected = {}
    for size in (1 << 20, bucket):
        monkeypatch.setattr(zclip.updates.pieces, "BUCKET", size)
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        for step in range(3):
            optimizer.zero_grad()
            backward(net, step)
            expected.setdefault(step, float(update_norm(optimizer)))
            assert float(update_norm(optimizer)) == pytest.approx(expected[step], rel=1e-12)
            optimizer.step()


def test_memory_layouts_and_half_precision_gradients_do_not_matter():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=LR, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        conv(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        conv.weight.grad = conv.weight.grad.contiguous()
        norm = float(update_norm(optimizer))
        assert norm == pytest.approx(moved(optimizer), rel=1e-4)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("layout", ["expanded", "column", "transposed"])
def test_strides_of_gradients_do_not_matter(make, layout):
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=draw)) for shape in ((6,), (4, 6))]
    optimizer = make(parameters)
    for _ in range(3):
        for p in parameters:
            wide = torch.randn(*p.shape, 5, dtype=torch.float64, generator=draw)
            p.grad = {
                "expanded": wide.flatten()[0].expand_as(p),
                "column": wide[..., 0],
                "transposed": wide[..., 0].t().contiguous().t(),
            }[layout]
        norm = float(update_norm(optimizer))
        for p in parameters:
            p.grad = p.grad.contiguous()  # torch's fused step takes no other
        assert norm == pytest.approx(moved(optimizer), rel=1e-9)


def test_no_gradients_are_an_update_of_zero():
    assert float(update_norm(torch.optim.AdamW(model().parameters()))) == 0.0


UNSUPPORTED = {"Muon": {}, "NAdam": {}, "RMSprop": {}, "Adafactor": {}, "Adagrad": {}}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_optimizers_are_refused_by_name(name):
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    words = rf"^the update of {name} is not known before its step: Adam, AdamW and SGD of torch are supported$"
    with pytest.raises(TypeError, match=words):
        update_norm(optimizer)
    with pytest.raises(TypeError, match=r"^the update of Linear is not known"):
        update_norm(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"^update_norm\(\) takes one optimizer or more$"):
        update_norm()


def test_no_temporary_has_the_size_of_the_model(monkeypatch):
    monkeypatch.setattr(zclip.updates.pieces, "BUCKET", 1 << 12)
    net = nn.Linear(200, 1000, bias=False)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        net.weight.grad = torch.ones_like(net.weight)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            update_norm(optimizer)
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert 0 < largest <= 3 * 4 * (1 << 12)
        optimizer.step()


ALL = [*itertools.product((False, True), repeat=2)]


@pytest.mark.parametrize(("nesterov", "late"), ALL)
def test_buffer_that_starts_later_starts_as_the_gradient(nesterov, late):
    net = model()
    dampening = 0.0 if nesterov else 0.5
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, dampening=dampening, nesterov=nesterov)
    for step in range(4):
        optimizer.zero_grad()
        backward(net, step)
        if late and step < 2:
            net[0].weight.grad = None
        norm = float(update_norm(optimizer))
        assert norm == pytest.approx(moved(optimizer), rel=1e-9)
