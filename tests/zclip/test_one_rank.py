"""A process group of one rank, and DTensors on a mesh of one rank, change nothing; tests/distributed has several."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.helpers import same
from tests.zclip.every_strategy import OF_NORMS, SHORT
from zclip import ClippingStrategy, FixedNorm, SkipStep
from zclip.norm import parameters_of
from zclip.updates import UpdateClip

SHAPES = [(4, 3), (5,), (2, 3, 2), (6, 1)]


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh(group) -> DeviceMesh:
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))


def drawn(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and gradients."""
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)) for shape in SHAPES]


def plain(seed: int) -> list[nn.Parameter]:
    parameters = []
    for weight, gradient in drawn(seed):
        parameters.append(nn.Parameter(weight))
        parameters[-1].grad = gradient
    return parameters


def distributed(seed: int, mesh: DeviceMesh) -> list[nn.Parameter]:
    """The same as DTensors of several placements, but for the last one; one gradient has another placement."""
    placements = [(Replicate(), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Shard(1)), None]
    parameters = []
    for i, ((weight, gradient), where) in enumerate(zip(drawn(seed), placements, strict=True)):
        if where is None:
            parameters.append(nn.Parameter(weight))
            parameters[-1].grad = gradient
        else:
            parameters.append(nn.Parameter(distribute_tensor(weight, mesh, where)))
            parameters[-1].grad = distribute_tensor(gradient, mesh, (Replicate(), Replicate()) if i == 0 else where)
    return parameters


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def assert_same_step(ours: ClippingStrategy, other: ClippingStrategy, parameters, expected, **arguments) -> None:
    torch.testing.assert_close(ours.step(parameters, **arguments), other.step(expected))
    for p, q in zip(parameters, expected, strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad)
    assert ours.read_telemetry() == pytest.approx(other.read_telemetry(), nan_ok=True)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_group_of_one_rank_changes_nothing(make, group):
    ours, other = make(), make()
    for t in range(3):
        assert_same_step(ours, other, plain(t), plain(t), process_group=group)
    for p in (without := plain(0)):
        p.grad = None
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        ours.step(without, process_group=group)


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_mesh_of_one_rank_changes_nothing(make, mesh):
    ours, other = make(), make()
    for t in range(3):
        parameters = distributed(t, mesh)
        assert_same_step(ours, other, parameters, plain(t))
        assert parameters[0].grad.placements == parameters[0].placements
    for p in (without := distributed(0, mesh)):
        p.grad = None
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        ours.step(without)


def test_groups_are_those_that_shard_a_parameter(mesh):
    replicas, shards = mesh.get_group("replicas"), mesh.get_group("shards")
    parameters = distributed(0, mesh)
    assert [shard.groups for shard in parameters_of(parameters)] == [(shards,), (replicas, shards), (shards,), ()]
    fsdp1 = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    assert [shard.groups for shard in parameters_of([fsdp1, fsdp1])] == [()], "one rank shards nothing"


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_attached_strategy_asks_for_the_module_of_fsdp1(use_orig_params, group):
    model = FullyShardedDataParallel(
        nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=use_orig_params, process_group=group
    )
    optimizer, strategy = torch.optim.SGD(model.parameters(), lr=1.0), FixedNorm(0.01)
    message = r"^FSDP1 shards parameters, and only its module knows how: step\(model\), or attach\(optimizer, model\)$"
    with pytest.raises(ValueError, match=message):
        strategy.attach(optimizer, model.parameters())
    strategy.attach(optimizer)
    model(torch.ones(3, 2)).sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    strategy.detach()
    strategy.attach(optimizer, model)
    optimizer.step()
    assert strategy.read_telemetry()["clipped"] == 1


def test_gradient_that_is_not_on_the_mesh_of_its_parameter_is_refused(mesh):
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, (Shard(0), Shard(0))))
    plain = nn.Parameter(torch.ones(4))
    sharded.grad, plain.grad = torch.ones(4), distribute_tensor(torch.ones(4), mesh, (Shard(0), Shard(0)))
    other = nn.Parameter(distribute_tensor(torch.ones(4), mesh["shards"], (Shard(0),)))
    other.grad = plain.grad
    for parameter in (sharded, plain, other):
        with pytest.raises(TypeError, match=r"shape \(4,\) is not on the parameter's mesh: both must be plain tensors"):
            FixedNorm().step([parameter])


def of_mesh(value: float, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(torch.tensor(value), mesh, (Replicate(), Partial()))


@pytest.mark.parametrize("make", OF_NORMS.values(), ids=OF_NORMS)
def test_norm_and_loss_of_a_mesh_are_those_of_plain_tensors(make, mesh):
    """The norm is what torch's `clip_grad_norm_` returns of parameters that FSDP2 has sharded."""
    ours, other = make(), make()
    for t in range(8):
        parameters = distributed(t, mesh)[1:2]
        norm = torch.nn.utils.clip_grad_norm_(parameters, torch.inf)
        assert isinstance(norm, DTensor)
        expected = other.observe(whole(norm), loss=torch.tensor(2.0 - t))
        coefficient = ours.observe(norm, loss=of_mesh(2.0 - t, mesh))
        assert type(coefficient) is torch.Tensor and torch.equal(coefficient, expected)
    assert same(ours.state_dict(), other.state_dict()) and ours.read_telemetry() == pytest.approx(
        other.read_telemetry(), nan_ok=True
    )
    assert all(type(value) is torch.Tensor for value in [*ours.state.values(), *ours.telemetry.values()])


def test_loss_of_a_mesh_counts_in_a_step(mesh):
    strategy, parameters = SkipStep(window=4), distributed(0, mesh)
    for loss in (1.0, 1.5, 1.0, 9.0):
        strategy.step(parameters, loss=of_mesh(loss, mesh))
    assert strategy.state["losses"].tolist() == [1.0, 1.5, 1.0, 9.0] and strategy.read_telemetry()["skipped"]


def test_norm_of_a_mesh_counts_in_a_rule_over_updates(mesh):
    rule = UpdateClip(window=4)
    scales = [rule.observe(of_mesh(norm, mesh)) for norm in (1.0, 1.1, 1.0, 9.0)]
    assert all(type(scale) is torch.Tensor for scale in scales) and 0 < float(scales[-1]) < 0.2
    assert type(rule.state["history"]) is torch.Tensor and rule.state["history"][3] == 9.0
