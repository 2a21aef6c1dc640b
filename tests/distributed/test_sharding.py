"""Sharded training in gloo processes: norms, decisions and parameters equal those of one process.

Each case trains the same small model on the same global batches, one of which is a spike, and clips the gradients. The
test compares it with `train` in one process. SGD keeps rounding errors visible in the parameters.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.nets import Net, fsdp2_net, full_parameters, net_in_two_dimensions, net_on_two_meshes
from tests.gloo_pool import run
from tests.helpers import SLOW
from tests.zclip.every_strategy import SHORT
from zclip import AGC, AdaGC, GradientStabilizer, ZClip

STEPS = 12
COUNTS = ("clipped_units", "clipped_tensors")
Curve = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) * (30 if step == 9 else 1)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def fused_adamw(parameters) -> torch.optim.Optimizer:
    """Applies decisions inside its step; torch has no fused SGD for DTensors."""
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def train(
    model: nn.Module,
    rank: int = 0,
    world: int = 1,
    make: Callable = lambda: ZClip(warmup_steps=5),
    make_optimizer: Callable = sgd,
    attached: bool = False,
    counts: list[float] | None = None,
    **step,
) -> Curve:
    """Train on this rank's part of each batch; return norms, clipped norms and the full parameters.

    `counts` gets the number of clipped units of each step, or of clipped tensors.
    """
    strategy = make()
    optimizer = make_optimizer(model.parameters())
    if attached:
        strategy.attach(optimizer, model, **step)
    norms, clipped_norms = [], []
    for t in range(STEPS):
        optimizer.zero_grad()
        model(batch(t).chunk(world)[rank]).square().mean().backward()
        if not attached:
            strategy.step(model, optimizer=optimizer, **step)
            if make_optimizer is fused_adamw and strategy.telemetry["clipped"]:
                assert optimizer.grad_scale > 1, "the decision is applied inside the step"
        optimizer.step()
        norms.append(strategy.telemetry["grad_norm"].clone())
        clipped_norms.append(strategy.telemetry["clipped_norm"])
        if counts is not None:
            counts += [float(strategy.telemetry[key]) for key in COUNTS if key in strategy.telemetry]
    return torch.stack(norms), torch.stack(clipped_norms), full_parameters(model)


def ddp(rank: int, world: int) -> Curve:
    return train(DistributedDataParallel(Net()), rank, world)


def fsdp2(rank: int, world: int, **options) -> Curve:
    return train(fsdp2_net(world), rank, world, **options)


def fsdp2_adagc(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make=lambda: AdaGC(warmup_steps=4))


def fsdp2_agc(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make=AGC)


def fsdp2_fused(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make_optimizer=fused_adamw)


def two_dimensions_fused(rank: int, world: int) -> Curve:
    return tensor_parallel_and_fsdp2(rank, world, make_optimizer=fused_adamw)


def fsdp2_attached(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make_optimizer=fused_adamw, attached=True)


def clip_one_layer() -> ZClip:
    return ZClip(warmup_steps=5, scope="up.*")


def fsdp2_scope(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make=clip_one_layer)


def two_groups(parameters) -> torch.optim.Optimizer:
    """The weights of `Net` are a group, and its biases."""
    up, up_bias, down, down_bias = parameters
    return torch.optim.SGD(
        [{"params": [up, down], "name": "matrices"}, {"params": [up_bias, down_bias], "name": "biases"}], lr=0.01
    )


def clip_one_group() -> ZClip:
    return ZClip(warmup_steps=5, scope="group:matrices")


def fsdp2_group(rank: int, world: int) -> Curve:
    return fsdp2(rank, world, make=clip_one_group, make_optimizer=two_groups)


def clipped_are_counted_once(rank: int, world: int) -> None:
    """Units and tensors of which each rank holds a part, under FSDP2 and tensor parallelism."""
    for make in (AGC, lambda: AdaGC(warmup_steps=4)):
        expected: list[float] = []
        train(Net(), make=make, counts=expected)
        assert len(expected) == STEPS and max(expected) > 1
        for sharded in (fsdp2, tensor_parallel):
            counts: list[float] = []
            sharded(rank, world, make=make, counts=counts)
            assert counts == expected, sharded.__name__


def hsdp(rank: int, world: int) -> Curve:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    return train(model, rank, world)


def tensor_parallel(rank: int, world: int, **options) -> Curve:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return train(parallelize_module(Net(), init_device_mesh("cpu", (world,)), plan), **options)


def tensor_parallel_agc(rank: int, world: int) -> Curve:
    return tensor_parallel(rank, world, make=AGC)


def tensor_parallel_and_fsdp2(rank: int, world: int, **options) -> Curve:
    return train(net_in_two_dimensions(world), rank // (world // 2), 2, **options)


def partial_gradients(rank: int, world: int) -> Curve:
    """Parameters are replicated and the batch is sharded, as DTensors: each rank's gradient is one term of a sum."""
    mesh = init_device_mesh("cpu", (world,))
    model = distribute_module(
        Net(), mesh, input_fn=lambda module, inputs, mesh: DTensor.from_local(inputs[0], mesh, [Shard(0)])
    )
    model(batch(0).chunk(world)[rank]).square().mean().backward()
    assert all(isinstance(p.grad.placements[0], Partial) for p in model.parameters())
    return train(model, rank, world)


def two_meshes(rank: int, world: int) -> Curve:
    """Two meshes in one model: one layer is sharded over all ranks, the other over pairs."""
    return train(net_on_two_meshes(world), rank, world)


def plain_and_dtensor(rank: int, world: int) -> Curve:
    """One layer is sharded, the other is plain, with gradients averaged by a hook."""
    model = Net()
    fully_shard(model.up, mesh=init_device_mesh("cpu", (world,)))

    for p in model.down.parameters():
        p.register_hook(lambda gradient: _average(gradient, world))
    return train(model, rank, world)


def fsdp1(
    rank: int,
    world: int,
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD,
    orig: bool = True,
    attached: bool = False,
) -> Curve:
    group = None
    if strategy is ShardingStrategy.HYBRID_SHARD:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        group = {"device_mesh": mesh}
    model = FullyShardedDataParallel(
        Net(), sharding_strategy=strategy, use_orig_params=orig, device_id=torch.device("cpu"), **(group or {})
    )
    norms, clipped_norms, _ = train(model, rank, world, attached=attached)
    with FullyShardedDataParallel.summon_full_params(model):
        return norms, clipped_norms, full_parameters(model).clone()


def fsdp1_flat(rank: int, world: int) -> Curve:
    return fsdp1(rank, world, orig=False)


def fsdp1_attached(rank: int, world: int) -> Curve:
    return fsdp1(rank, world, attached=True)


def fsdp1_hybrid(rank: int, world: int) -> Curve:
    return fsdp1(rank, world, ShardingStrategy.HYBRID_SHARD)


def fsdp1_no_shard(rank: int, world: int) -> Curve:
    return fsdp1(rank, world, ShardingStrategy.NO_SHARD)


def fsdp1_ignoring_a_layer(rank: int, world: int) -> Curve:
    """FSDP1 ignores one layer, whose gradients are averaged by a hook."""
    model = Net()
    for p in model.down.parameters():
        p.register_hook(lambda gradient: _average(gradient, world))
    sharded = FullyShardedDataParallel(
        model, ignored_modules=[model.down], use_orig_params=True, device_id=torch.device("cpu")
    )
    norms, clipped_norms, _ = train(sharded, rank, world)
    with FullyShardedDataParallel.summon_full_params(sharded):
        return norms, clipped_norms, full_parameters(sharded).clone()


def _average(gradient: torch.Tensor, world: int) -> torch.Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient / world


def fsdp1_without_its_module(rank: int, world: int) -> Curve:
    """Gradients of a shard alone would give each rank another norm."""
    for orig in (False, True):
        model = FullyShardedDataParallel(Net(), use_orig_params=orig, device_id=torch.device("cpu"))
        model(batch(0).chunk(world)[rank]).square().mean().backward()
        inner = model.module  # knows nothing of its shards either
        for given in (model.parameters(), [*model.parameters()], inner):
            with pytest.raises(ValueError, match=r"^FSDP1 shards parameters, and only its module knows how: step\(mod"):
                ZClip().step(given)
        norm = ZClip().step(model, model.parameters())
        single = Net()
        single(batch(0)).square().mean().backward()
        torch.testing.assert_close(norm, ZClip().step(single))
    return (torch.zeros(1),) * 3


def fsdp1_agc(rank: int, world: int) -> Curve:
    with pytest.raises(ValueError, match="AGC needs the rows of weights, which FSDP1 flattens"):
        train(FullyShardedDataParallel(Net(), device_id=torch.device("cpu")), rank, world, make=AGC)
    return (torch.zeros(1),) * 3


def pipeline_adagc(rank: int, world: int) -> Curve:
    return pipeline(rank, world, make=lambda: AdaGC(warmup_steps=4))


def pipeline_stabilizer(rank: int, world: int) -> Curve:
    return pipeline(rank, world, make=GradientStabilizer)


def pipeline_agc(rank: int, world: int) -> Curve:
    return pipeline(rank, world, make=AGC)


def pipeline(rank: int, world: int, make: Callable = lambda: ZClip(warmup_steps=5)) -> Curve:
    """Each rank runs the full model, but clips and trains one layer only."""
    model = Net()
    own_layer = (model.up, model.down)[rank]
    zclip = make()
    optimizer = torch.optim.SGD(own_layer.parameters(), lr=0.01)
    norms, clipped_norms = [], []
    for t in range(STEPS):
        model.zero_grad()
        model(batch(t)).square().mean().backward()
        norms.append(zclip.step(own_layer, optimizer=optimizer, process_group=dist.group.WORLD).double())
        clipped_norms.append(zclip.telemetry["clipped_norm"])
        optimizer.step()
        for owner, layer in enumerate((model.up, model.down)):
            for p in layer.parameters():
                dist.broadcast(p.data, owner)
    return torch.stack(norms), torch.stack(clipped_norms), full_parameters(model)


def rank_without_gradients(rank: int, world: int) -> Curve:
    """Only rank 0 has gradients, as if later pipeline stages had nothing to do."""
    model, zclip, norms, clipped_norms = Net(), ZClip(warmup_steps=5), [], []
    for t in range(STEPS):
        model.zero_grad()
        if rank == 0:
            model(batch(t)).square().mean().backward()
        norms.append(zclip.step(model, process_group=dist.group.WORLD).double())
        clipped_norms.append(zclip.telemetry["clipped_norm"])
        if rank == 0:
            for p in model.parameters():
                p.data.sub_(0.01 * p.grad)
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    return torch.stack(norms), torch.stack(clipped_norms), full_parameters(model)


def no_rank_has_gradients(rank: int, world: int) -> Curve:
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        ZClip().step(Net(), process_group=dist.group.WORLD)
    return (torch.zeros(1),) * 3


def every_strategy(rank: int, world: int) -> Curve:
    """Every strategy over two mesh dimensions, against training with it in one process."""
    for make in SHORT.values():
        expected = train(Net(), make=make)
        curve = tensor_parallel_and_fsdp2(rank, world, make=make)
        for one, other, rtol in zip(curve, expected, (1e-6, 2e-6, 1e-5), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-7, msg=f"{make()} differs")
    return (torch.zeros(1),) * 3


def stage_without_scope(rank: int, world: int) -> Curve:
    """Pipeline stages of which the second has nothing in the scope clip as one process does."""
    for make in SHORT.values():
        model, expected, strategy, reference = Net(), Net(), make(), make()
        strategy.scope = reference.scope = "up.*"
        own = nn.ModuleDict({("up", "down")[rank]: (model.up, model.down)[rank]})
        optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
        for t in range(5):
            for each in (model, expected):
                each.zero_grad()
                each(batch(t)).square().mean().backward()
            strategy.step(own, optimizer=optimizer, process_group=dist.group.WORLD)
            reference.step(expected)
            for one, other in zip(model.parameters(), expected.parameters(), strict=True):
                if id(one) in set(map(id, own.parameters())):
                    torch.testing.assert_close(one.grad, other.grad)
            for key, value in reference.telemetry.items():
                torch.testing.assert_close(strategy.telemetry[key], value, equal_nan=True, check_dtype=False)
        restored = make()
        restored.scope = strategy.scope
        restored.load_state_dict(strategy.state_dict())
    return (torch.zeros(1),) * 3


def scope_of_no_stage(rank: int, world: int) -> Curve:
    """All stages raise if no one has a parameter in the scope, and none warns of a pattern that another one has."""
    model = Net()
    model(batch(0)).square().mean().backward()
    own = nn.ModuleDict({("up", "down")[rank]: (model.up, model.down)[rank]})
    with pytest.raises(ValueError, match=r"^scope=head\.\* has none of the 2 parameters"):
        ZClip(scope="head.*").step(own, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"^scope=head\.\* has none of the 2 parameters"):
        AdaGC(scope="head.*").prepare(own, process_group=dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZClip(scope=["*.weight", "!up.*"]).step(own, process_group=dist.group.WORLD)
    with pytest.warns(UserWarning, match=r"^'!head\*' in scope=\[\*\.weight, !head\*\] matches no parameter$"):
        ZClip(scope=["*.weight", "!head*"]).step(own, process_group=dist.group.WORLD)
    prepared = AdaGC(scope="up.*")
    prepared.prepare(own, process_group=dist.group.WORLD)
    assert len(prepared.state["gamma"]) == (1, 2)[rank == 0]
    norm = ZClip().step(*[own] * (rank == 0), process_group=dist.group.WORLD)  # the last stage holds no parameter
    assert norm > 0
    return (torch.zeros(1),) * 3


def nan_on_one_rank(rank: int, world: int) -> Curve:
    """A NaN on one rank skips the step on all ranks."""
    model, zclip = Net(), ZClip(warmup_steps=5)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for t in range(6):
        optimizer.zero_grad()
        model(batch(t).chunk(world)[rank]).square().mean().backward()
        before = full_parameters(model).clone()
        if t == 4 and rank == world - 1:
            model.up.weight.grad.to_local()[0] = float("nan")
        zclip.step(model, optimizer=optimizer)
        optimizer.step()
        assert torch.equal(before, full_parameters(model)) == (t == 4)
    assert zclip.read_telemetry()["nonfinite"] == 1
    return (torch.zeros(1),) * 3


def in_group(rank: int, world: int, name: str) -> Curve:
    """Run a case in a process group."""
    dist.init_process_group("gloo")
    return globals()[name](rank, world)


CASES = [
    (ddp, 2, {}), (fsdp2, 2, {}), (hsdp, 4, {}), (tensor_parallel, 2, {}), (tensor_parallel_and_fsdp2, 4, {}),
    (two_meshes, 4, {}), (plain_and_dtensor, 2, {}), (partial_gradients, 2, {}),
    (pipeline, 2, {}), (rank_without_gradients, 2, {}), (fsdp1, 2, {}), (fsdp1_no_shard, 2, {}),
    (fsdp1_hybrid, 4, {}), (fsdp1_ignoring_a_layer, 2, {}),
    (fsdp2_adagc, 2, {"make": lambda: AdaGC(warmup_steps=4)}), (tensor_parallel_agc, 2, {"make": AGC}),
    (fsdp2_fused, 2, {"make_optimizer": fused_adamw}), (pipeline_adagc, 2, {"make": lambda: AdaGC(warmup_steps=4)}),
    (pipeline_stabilizer, 2, {"make": GradientStabilizer}),
    (fsdp2_attached, 2, {"make_optimizer": fused_adamw}), (fsdp1_attached, 2, {}),
    (fsdp2_scope, 2, {"make": clip_one_layer}),
    (fsdp2_group, 2, {"make": clip_one_group, "make_optimizer": two_groups}),
]  # fmt: skip
SLOW_CASES = [
    (fsdp1_flat, 2, {}), (fsdp2_agc, 2, {"make": AGC}), (pipeline_agc, 2, {"make": AGC}),
    (two_dimensions_fused, 4, {"make_optimizer": fused_adamw}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "world", "options"),
    [pytest.param(*case, id=case[0].__name__) for case in CASES]
    + [SLOW(*case, id=case[0].__name__) for case in SLOW_CASES],
)
def test_sharded_training_equals_unsharded_training(case, world, options):
    norms, clipped_norms, parameters = train(Net(), **options)
    assert ((clipped_norms / norms - 1).abs() > 0.1).any(), "some gradients are scaled"
    for curve in run(in_group, world, case.__name__):
        torch.testing.assert_close(curve[0], norms, rtol=1e-6, atol=0)
        torch.testing.assert_close(curve[1], clipped_norms, rtol=2e-6, atol=0)
        torch.testing.assert_close(curve[2], parameters, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("case", "world"),
    [
        (no_rank_has_gradients, 2),
        (nan_on_one_rank, 2),
        (stage_without_scope, 2),
        (scope_of_no_stage, 2),
        (fsdp1_agc, 2),
        (fsdp1_without_its_module, 2),
        (clipped_are_counted_once, 2),
        SLOW(every_strategy, 4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_all_ranks_make_the_same_decision(case, world):
    run(in_group, world, case.__name__)
