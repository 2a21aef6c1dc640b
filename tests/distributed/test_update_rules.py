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
from zclip.updates import SPAM, OptimizerRule, StableAdamW, UpdateBrake, UpdateClip

STEPS = 30
Curve = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) * (30 if 20 <= step < 26 else 1)


def fused_adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def momentum(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


#: Rules, and the two columns of their telemetry that are compared.
RULES: dict[str, tuple[Callable[[], OptimizerRule], tuple[str, str]]] = {
    "clip": (lambda: UpdateClip(sigmas=0.5, window=8), ("update_norm", "update_scale")),
    "brake": (
        lambda: UpdateBrake(margin=1.01, sigmas=0, fall_steps=2, warmup_steps=3),
        ("update_norm", "update_scale"),
    ),
    "spam": (lambda: SPAM(theta=30.0), ("clipped_element_share", "update_clipped")),
    "spam_reset": (
        lambda: SPAM(theta=30.0, reset_every=7, reset_warmup_steps=4),
        ("clipped_element_share", "update_scale"),
    ),
    "stable_adamw": (StableAdamW, ("update_rms", "lowest_update_scale")),
}


def train(
    model: nn.Module,
    rank: int = 0,
    world: int = 1,
    make_optimizer: Callable = fused_adamw,
    rule: str = "clip",
) -> Curve:
    """Train on this rank's part of each batch; return two columns of telemetry, and the full parameters."""
    return steps(model, make_optimizer(model.parameters()), rule, lambda t: batch(t).chunk(world)[rank])


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str,
    batch_of: Callable[[int], torch.Tensor],
    synchronise: Callable[[], object] = lambda: None,
    **attach,
) -> Curve:
    make_rule, names = RULES[name]
    rule, zclip = make_rule(), ZClip(warmup_steps=5)
    rule.attach(optimizer, **attach)
    zclip.attach(optimizer, **attach)
    columns: list[list[torch.Tensor]] = [[], []]
    for t in range(STEPS):
        model.zero_grad()
        model(batch_of(t)).square().mean().backward()
        optimizer.step()
        synchronise()
        for column, key in zip(columns, names, strict=True):
            column.append(rule.telemetry[key].double())
    return torch.stack(columns[0]), torch.stack(columns[1]), full_parameters(model)


def fsdp2(rank: int, world: int, **options) -> Curve:
    return train(fsdp2_net(world), rank, world, **options)


def fsdp2_momentum(rank: int, world: int, rule: str) -> Curve:
    return fsdp2(rank, world, make_optimizer=momentum, rule=rule)


def two_meshes(rank: int, world: int, rule: str) -> Curve:
    """One layer is sharded over all ranks, the other over pairs."""
    return train(net_on_two_meshes(world), rank, world, rule=rule)


def tensor_parallel_and_fsdp2(rank: int, world: int, rule: str) -> Curve:
    return train(net_in_two_dimensions(world), rank // (world // 2), 2, rule=rule)


def pipeline(rank: int, world: int, rule: str) -> Curve:
    """Each rank runs the full model, but trains one layer only."""
    model = Net()
    optimizer = fused_adamw((model.up, model.down)[rank].parameters())

    def synchronise() -> None:
        for owner, layer in enumerate((model.up, model.down)):
            for p in layer.parameters():
                dist.broadcast(p.data, owner)

    return steps(model, optimizer, rule, batch, synchronise, process_group=dist.group.WORLD)


def fsdp1(rank: int, world: int, rule: str) -> Curve:
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"^FSDP1 has flattened the parameters: update norms need FSDP2"):
        RULES[rule][0]().attach(fused_adamw(model.parameters()))
    return (torch.zeros(1),) * 3


def in_group(rank: int, world: int, name: str, rule: str) -> Curve:
    """Run a case in a process group."""
    dist.init_process_group("gloo")
    return globals()[name](rank, world, rule=rule)


@pytest.mark.parametrize(
    ("rule", "case", "world"),
    [
        ("clip", fsdp2, 2), SLOW("clip", fsdp2_momentum, 2), SLOW("clip", two_meshes, 4),
        SLOW("clip", tensor_parallel_and_fsdp2, 4), SLOW("clip", pipeline, 2),
        ("brake", fsdp2, 2), SLOW("brake", two_meshes, 4), SLOW("brake", tensor_parallel_and_fsdp2, 4),
        SLOW("brake", pipeline, 2),
        ("stable_adamw", fsdp2, 2), SLOW("stable_adamw", two_meshes, 4),
        SLOW("stable_adamw", tensor_parallel_and_fsdp2, 4), SLOW("stable_adamw", pipeline, 2),
        ("spam", fsdp2, 2), SLOW("spam", two_meshes, 4), SLOW("spam", pipeline, 2),
        SLOW("spam_reset", fsdp2, 2), SLOW("spam_reset", two_meshes, 4), SLOW("spam_reset", pipeline, 2),
    ],
)  # fmt: skip
def test_sharded_rule_decides_as_in_one_process(rule, case, world):
    make_optimizer = momentum if case is fsdp2_momentum else fused_adamw
    expected = train(Net(), make_optimizer=make_optimizer, rule=rule)
    assert 0 < (expected[1] < 0.99).sum() < STEPS
    for curve in run(in_group, world, case.__name__, rule):
        for one, other, rtol in zip(curve, expected, (1e-4, 1e-4, 1e-3), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_flattened_parameters_are_refused(rule):
    run(in_group, 2, "fsdp1", rule)
