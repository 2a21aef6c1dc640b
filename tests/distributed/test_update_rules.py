"""Rules over updates in gloo processes: norms, scales and weights equal those of one process."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.distributed.nets import Net, fsdp2_net, full_parameters, net_in_two_dimensions, net_on_two_meshes
from tests.gloo_pool import run
from tests.helpers import SLOW
from zclip import ZClip
from zclip.updates import UpdateClip

STEPS = 30
Curve = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) * (30 if 20 <= step < 26 else 1)


def fused_adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def momentum(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def train(model: nn.Module, rank: int = 0, world: int = 1, make_optimizer: Callable = fused_adamw, **attach) -> Curve:
    """Train on this rank's part of each batch; return norms, scales and the full parameters."""
    optimizer, rule, zclip = make_optimizer(model.parameters()), UpdateClip(sigmas=0.5, window=8), ZClip(warmup_steps=5)
    rule.attach(optimizer, **attach)
    zclip.attach(optimizer, **attach)
    norms, scales = [], []
    for t in range(STEPS):
        optimizer.zero_grad()
        model(batch(t).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        norms.append(rule.telemetry["update_norm"])
        scales.append(rule.telemetry["update_scale"])
    return torch.stack(norms), torch.stack(scales), full_parameters(model)


def fsdp2(rank: int, world: int, **options) -> Curve:
    return train(fsdp2_net(world), rank, world, **options)


def fsdp2_momentum(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make_optimizer=momentum)


def two_meshes(rank: int, world: int) -> Curve:
    """One layer is sharded over all ranks, the other over pairs."""
    return train(net_on_two_meshes(world), rank, world)


def tensor_parallel_and_fsdp2(rank: int, world: int) -> Curve:
    return train(net_in_two_dimensions(world), rank // (world // 2), 2)


def pipeline(rank: int, world: int) -> Curve:
    """Each rank runs the full model, but trains one layer only."""
    model = Net()
    optimizer, rule, zclip = (
        fused_adamw((model.up, model.down)[rank].parameters()),
        UpdateClip(0.5, 8),
        ZClip(warmup_steps=5),
    )
    for part in (rule, zclip):
        part.attach(optimizer, process_group=dist.group.WORLD)
    norms, scales = [], []
    for t in range(STEPS):
        model.zero_grad()
        model(batch(t)).square().mean().backward()
        optimizer.step()
        norms.append(rule.telemetry["update_norm"])
        scales.append(rule.telemetry["update_scale"])
        for owner, layer in enumerate((model.up, model.down)):
            for p in layer.parameters():
                dist.broadcast(p.data, owner)
    return torch.stack(norms), torch.stack(scales), full_parameters(model)


def fsdp1(rank: int, world: int) -> Curve:
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"^FSDP1 has flattened the parameters: update norms need FSDP2"):
        UpdateClip().attach(fused_adamw(model.parameters()))
    return (torch.zeros(1),) * 3


def in_group(rank: int, world: int, name: str) -> Curve:
    """Run a case in a process group."""
    dist.init_process_group("gloo")
    return globals()[name](rank, world)


@pytest.mark.parametrize(
    ("case", "world"),
    [
        (fsdp2, 2), SLOW(fsdp2_momentum, 2), SLOW(two_meshes, 4), SLOW(tensor_parallel_and_fsdp2, 4),
        SLOW(pipeline, 2),
    ],
)  # fmt: skip
def test_sharded_rule_decides_as_in_one_process(case, world):
    make_optimizer = momentum if case is fsdp2_momentum else fused_adamw
    expected = train(Net(), make_optimizer=make_optimizer)
    assert 0 < (expected[1] < 0.99).sum() < STEPS
    for curve in run(in_group, world, case.__name__):
        for one, other, rtol in zip(curve, expected, (1e-4, 1e-4, 1e-3), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)


@pytest.mark.slow
def test_flattened_parameters_are_refused():
    run(in_group, 2, "fsdp1")
