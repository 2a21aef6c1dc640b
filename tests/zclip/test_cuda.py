"""On a GPU: no step waits for the device, and the weights match those of a CPU."""

import copy

import pytest
import torch
from torch import nn

from tests.zclip.every_strategy import SHORT
from zclip import ClippingStrategy, ZClip
from zclip.updates import SPAM, StableAdamW, UpdateBrake, UpdateClip, UpdateDecision, UpdateMonitor, UpdateRule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train(strategy: ClippingStrategy, model: nn.Module, pass_optimizer: bool) -> list[torch.Tensor]:
    """Train on gradients drawn on the CPU, which include a spike and a NaN; return the norms."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    draw = torch.Generator().manual_seed(0)
    steps = [[torch.randn(p.shape, generator=draw) for p in model.parameters()] for _ in range(30)]
    steps[20] = [g * 30 for g in steps[20]]
    steps[25][0][0, 0] = torch.nan
    steps = [[g.to(device) for g in gradients] for gradients in steps]
    loss = torch.ones((), device=device)
    norms = []
    for i, gradients in enumerate(steps):
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        if i == 2 and device.type == "cuda":  # the first steps allocate
            torch.cuda.set_sync_debug_mode("error")
        try:
            norms.append(strategy.step(model, optimizer=optimizer if pass_optimizer else None, loss=loss))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return norms


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("pass_optimizer", [False, True])
def test_no_step_waits_for_the_device_and_weights_match_the_cpu(make, pass_optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7))
    cuda_model, strategy = copy.deepcopy(model).cuda(), make()
    norms, cuda_norms = train(make(), model, pass_optimizer), train(strategy, cuda_model, pass_optimizer)
    torch.testing.assert_close(torch.stack(cuda_norms).cpu(), torch.stack(norms), rtol=1e-5, atol=0, equal_nan=True)
    for p, q in zip(model.parameters(), cuda_model.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-4, atol=1e-5)
    assert strategy.read_telemetry()["nonfinite"] == 1


def test_consecutive_nonfinite_norms_raise_a_step_late():
    model = nn.Linear(3, 3).cuda()
    zclip = ZClip(max_consecutive_nonfinite=3)
    with pytest.raises(FloatingPointError, match="times in a row"):
        for _ in range(10):
            model.weight.grad = torch.full_like(model.weight, torch.nan)
            zclip.step(model)
            torch.cuda.synchronize()


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_states_of_the_device_load_there_and_on_the_cpu(make):
    strategy, model = make(), nn.Linear(4, 3).cuda()
    train(strategy, model, pass_optimizer=True)
    make().load_state_dict(strategy.state_dict())
    strategy.change()  # checks the statistics where they are


RULES = [
    UpdateMonitor,
    lambda: UpdateClip(0.2, 8),
    lambda: UpdateBrake(1.01, sigmas=0),
    StableAdamW,
    lambda: SPAM(20.0),
    lambda: SPAM(20.0, reset_every=9, reset_warmup_steps=4),
]


@pytest.mark.parametrize("make", RULES)
def test_no_step_with_a_rule_over_updates_waits_and_scales_match_the_cpu(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7))
    scales = {}
    for device in ("cpu", "cuda"):
        moved, rule, zclip = copy.deepcopy(model).to(device), make(), ZClip()
        optimizer = torch.optim.AdamW(moved.parameters(), lr=0.01, fused=True)
        rule.attach(optimizer)
        zclip.attach(optimizer)
        draw = torch.Generator().manual_seed(0)
        seen = []
        for i in range(40):
            for p in moved.parameters():
                p.grad = (torch.randn(p.shape, generator=draw) * 1.03**i).to(device)
            if i == 2 and device == "cuda":  # the first steps allocate
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert optimizer.param_groups[0]["lr"] == 0.01
            seen.append([*rule.telemetry.values()][:2])
        scales[device] = torch.tensor([[float(value) for value in pair] for pair in seen])
        scales[f"{device} weights"] = torch.cat([p.detach().cpu().flatten() for p in moved.parameters()])
    torch.testing.assert_close(scales["cuda"], scales["cpu"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scales["cuda weights"], scales["cpu weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [torch.nan, 0.0, 2.0])
def test_scale_that_is_not_allowed_counts_as_one_and_raises_a_step_late(scale):
    class Own(UpdateRule):
        def initial_state(self, like):
            return {"count": torch.zeros((), dtype=torch.int64, device=like.device)}

        def decide(self, norm, state):
            return UpdateDecision(torch.full_like(norm, scale), norm > 0, norm, {"count": state["count"] + 1})

    weight, rule = nn.Parameter(torch.ones(3, device="cuda")), Own()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    rule.attach(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert float(weight[0]) == pytest.approx(0.899) and int(rule.state["count"]) == 0
    with pytest.raises(ValueError, match=r"^Own\.decide must return scales above 0 and at most 1: in \d steps one was"):
        for _ in range(5):
            torch.cuda.synchronize()
            optimizer.step()


def test_default_device_of_a_gpu_does_not_matter():
    model, zclip = nn.Linear(3, 3).cuda(), ZClip()
    torch.set_default_device("cuda")
    try:
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            assert zclip.step(model).is_cuda
    finally:
        torch.set_default_device(None)
