"""Each tensor has its own statistics, whatever is frozen, reordered, wrapped, sharded or added meanwhile."""

import copy
import io
import json

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from zclip import AdaGC, ClippingCallback, ClippingStrategy, GradientStabilizer
from zclip.integrations.transformers import _json, _tensors
from zclip.tensors import parameter_names


def adagc() -> AdaGC:
    """AdaGC that clips nothing in its first step, so that averages start as norms."""
    return AdaGC(warmup_steps=1, lambda_abs=1e9)


EACH = pytest.mark.parametrize("make", [adagc, GradientStabilizer], ids=["adagc", "stabilizer"])

#: Norm of the gradient of each tensor, by which its statistics are known.
LEVELS = {"embed.weight": 1.0, "layer.0.weight": 10.0, "layer.1.weight": 100.0, "head.weight": 1000.0}


class Model(nn.Module):
    """Four tensors, of which three have the same shape; `order` is that of the definition."""

    def __init__(self, order=("embed", "layer", "head"), tied: bool = False) -> None:
        super().__init__()
        for name in order:
            if name == "layer":
                self.layer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
            else:
                setattr(self, name, nn.Linear(4, 4, bias=False) if name == "head" else nn.Embedding(6, 4))
        if tied:
            self.head.weight = self.embed.weight


def set_gradients(model: nn.Module) -> None:
    """Give each trainable parameter a gradient of the norm of its level."""
    names = parameter_names(model)
    for p in model.parameters():
        level = LEVELS.get(names[id(p)], 5.0)
        p.grad = torch.full_like(p, level / p.numel() ** 0.5) if p.requires_grad else None


def take_steps(strategy: ClippingStrategy, model: nn.Module, count: int = 3) -> None:
    for _ in range(count):
        set_gradients(model)
        strategy.step(model)


def levels(strategy: ClippingStrategy) -> dict[object, float]:
    """The average of each tensor, by its name."""
    average = strategy.state.get("gamma", strategy.state.get("v", torch.zeros(0)).sqrt())
    return {tensor.name: value for tensor, value in zip(strategy.tensors, average.tolist(), strict=True)}


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_statistics_follow_a_parameter_that_is_frozen_while_another_is_not():
    """What the strategy knows of each tensor is its level, not that of the tensor at its place."""
    model, strategy = Model(), adagc()
    model.layer[1].weight.requires_grad_(False)
    take_steps(strategy, model)
    model.layer[0].weight.requires_grad_(False)
    model.layer[1].weight.requires_grad_(True)
    take_steps(strategy, model)
    assert levels(strategy) == pytest.approx({**LEVELS, "layer.1.weight": levels(strategy)["layer.1.weight"]})
    assert levels(strategy)["layer.1.weight"] == pytest.approx(100.0), "from its own first step on"
    model.layer[0].weight.requires_grad_(True)
    set_gradients(model)
    strategy.step(model)
    assert float(strategy.read_telemetry()["clipped"]) == 0, "a tensor that was frozen meanwhile has its statistics"


@EACH
@pytest.mark.parametrize("frozen", [[], ["embed.weight"], ["layer.0.weight", "head.weight"]])
@pytest.mark.parametrize("order", [("embed", "layer", "head"), ("head", "layer", "embed")])
def test_saved_statistics_are_found_by_name(make, frozen, order):
    strategy, restored = make(), make()
    take_steps(strategy, Model())
    restored.load_state_dict(through_a_file(strategy.state_dict()))
    model = Model(order)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    set_gradients(model)
    restored.step(model)
    if make is not GradientStabilizer:
        assert levels(restored) == pytest.approx(LEVELS)
    steps = dict(
        zip([t.name for t in restored.tensors], restored.state.get("steps", torch.zeros(4)).tolist(), strict=True)
    )
    assert all(steps[name] == (3 if name in frozen else 4) for name in LEVELS) or make is not GradientStabilizer
    assert list(levels(restored)) == [name for name, _ in model.named_parameters()]


@EACH
def test_added_tensors_start_fresh_and_others_keep_their_statistics(make):
    strategy, restored = make(), make()
    take_steps(strategy, Model())
    restored.load_state_dict(through_a_file(strategy.state_dict()))
    before = levels(strategy)
    for wider in (strategy, restored):
        model = Model()
        model.adapter = nn.Linear(4, 4)
        set_gradients(model)
        wider.prepare(model)
        wider.step(model)
        after = levels(wider)
        assert list(after) == [*LEVELS, "adapter.weight", "adapter.bias"]
        assert [after[name] for name in LEVELS] == pytest.approx([before[name] for name in LEVELS], rel=0.2)
        fresh = make()
        set_gradients(model)
        fresh.step(model)
        if make is GradientStabilizer:
            assert after["adapter.bias"] == levels(fresh)["adapter.bias"]
        else:
            assert after["adapter.bias"] == pytest.approx(5.0), "the norm of its first gradient, which is not clipped"


def test_tensor_of_another_shape_starts_fresh():
    strategy, restored, model = GradientStabilizer(), GradientStabilizer(), Model()
    take_steps(strategy, model)
    restored.load_state_dict(strategy.state_dict())
    model.embed = nn.Embedding(9, 4)
    take_steps(restored, model, 1)
    assert dict(zip(LEVELS, restored.state["steps"].tolist(), strict=True)) == {
        name: 1 if name == "embed.weight" else 4 for name, _ in model.named_parameters()
    }


def test_statistics_of_another_model_are_refused():
    strategy, restored = adagc(), adagc()
    take_steps(strategy, Model())
    restored.load_state_dict(strategy.state_dict())
    other = nn.Linear(3, 3)
    set_gradients(other)
    before = copy.deepcopy(restored.state_dict())
    with pytest.raises(
        ValueError, match=r"^AdaGC has statistics of 4 tensors \(embed\.weight of shape .*: use one str"
    ):
        restored.step(other)
    assert restored.state_dict()["names"] == before["names"]
    take_steps(restored, Model(), 1)


def test_list_in_another_order_has_its_statistics_in_one_process():
    strategy, model = adagc(), Model()
    for _ in range(3):
        set_gradients(model)
        strategy.step(list(model.parameters()))
    set_gradients(model)
    strategy.step([*model.parameters()][::-1])
    assert list(levels(strategy).values()) == pytest.approx([*LEVELS.values()][::-1])
    set_gradients(model)
    strategy.step(model)
    assert levels(strategy) == pytest.approx(LEVELS)
    assert strategy.read_telemetry()["clipped"] == 0


def test_loaded_statistics_of_a_list_are_those_of_its_positions():
    strategy, restored, model = adagc(), adagc(), Model()
    set_gradients(model)
    strategy.step(model.parameters())
    assert strategy.state_dict()["names"] == [0, 1, 2, 3]
    restored.load_state_dict(through_a_file(strategy.state_dict()))
    for wrong in (
        [*model.parameters()][::-1],
        [*model.parameters()][:3],
        [*model.parameters(), nn.Parameter(torch.ones(1))],
    ):
        with pytest.raises(
            ValueError, match=r"^AdaGC has statistics of 4 tensors \(parameter 0 of shape \(6, 4\), para"
        ):
            restored.step(wrong)
    set_gradients(model)
    restored.step(model)
    assert levels(restored) == pytest.approx(LEVELS), "a list of all parameters is as good as the module"


def test_positions_count_frozen_parameters():
    strategy, model = adagc(), Model()
    model.layer[0].weight.requires_grad_(False)
    set_gradients(model)
    strategy.step(model.parameters())
    restored = adagc()
    restored.load_state_dict(strategy.state_dict())
    model.layer[0].weight.requires_grad_(True)
    model.layer[1].weight.requires_grad_(False)
    set_gradients(model)
    restored.step(model.parameters())
    assert list(levels(restored).values()) == pytest.approx([*LEVELS.values()])


def test_states_from_before_names_were_saved_load():
    """They are of the parameters that required gradients, in their order."""
    model = Model()
    model.layer[0].weight.requires_grad_(False)
    gamma = torch.tensor([1.0, 100.0, 1000.0], dtype=torch.float64)
    old = adagc().state_dict() | {
        "state": adagc().initial_state(torch.zeros_like(gamma)) | {"count": torch.tensor(3), "gamma": gamma},
        "counters": {key: torch.tensor(0) for key in ("consecutive_clips", "nonfinite", "consecutive_nonfinite")},
        "started": True,
    }
    del old["names"], old["shapes"]
    for given in (model, list(model.parameters()), [p for p in model.parameters() if p.requires_grad]):
        strategy = adagc()
        strategy.load_state_dict(old)
        assert strategy.state_dict()["names"] == [None] * 3
        strategy.load_state_dict(strategy.state_dict())
        set_gradients(model)
        strategy.step(given)
        known = [value for value in strategy.state["gamma"].tolist() if value != torch.inf]
        assert known == pytest.approx([1.0, 100.0, 1000.0])
    strategy.load_state_dict(old)
    with pytest.raises(ValueError, match=r"has statistics of 3 tensors, but step\(\) was given 1 tensor \("):
        strategy.step(model.head)


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled_layers(model: nn.Module) -> nn.Module:
    model.layer[0] = torch.compile(model.layer[0], backend="eager")
    model.layer[1] = checkpoint_wrapper(model.layer[1])
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fabric(model: nn.Module) -> nn.Module:
    return Fabric(accelerator="cpu", devices=1).setup(model)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compiled-layers": compiled_layers,
    "ddp": DistributedDataParallel,
    "compiled-ddp": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "data-parallel": nn.DataParallel,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fabric": fabric,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_of_the_module_without_its_wrappers(wrap, group):
    strategy, wrapped = adagc(), wrap(Model())
    assert set(parameter_names(wrapped).values()) == set(LEVELS)
    take_steps(strategy, Model())
    restored = adagc()
    restored.load_state_dict(strategy.state_dict())
    take_steps(restored, wrapped)
    assert levels(restored) == pytest.approx(LEVELS)
    plain = adagc()
    plain.load_state_dict(through_a_file(restored.state_dict()))
    take_steps(plain, Model())
    assert levels(plain) == pytest.approx(LEVELS)


def test_module_that_is_named_like_a_wrapper_keeps_its_name():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2, bias=False)

    assert [*parameter_names(Outer()).values()] == ["module.weight"]


def test_tied_parameters_have_one_name_in_any_order():
    for order in (("embed", "head"), ("head", "embed")):
        model = Model(order, tied=True)
        assert sorted(parameter_names(model).values()) == ["embed.weight"]
    strategy = adagc()
    take_steps(strategy, Model(tied=True))
    restored = adagc()
    restored.load_state_dict(strategy.state_dict())
    take_steps(restored, Model(("head", "layer", "embed"), tied=True))
    assert levels(restored) == pytest.approx({name: LEVELS[name] for name in LEVELS if name != "head.weight"})


def test_several_modules_have_names_of_their_own():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    names = parameter_names([one, [other], one])
    assert [names[id(p)] for p in (*one.parameters(), *other.parameters())] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert [*parameter_names([[one], one]).values()] == ["weight", "bias"]
    assert parameter_names([*one.parameters()]) == {}


def test_modules_of_a_generator_are_told_apart_by_their_names():
    """It can be read once only: by position, tensors in another order would have each other's statistics."""
    strategy, restored, model = adagc(), adagc(), Model(("head", "layer", "embed"))
    take_steps(strategy, Model())
    restored.prepare(module for module in [model])
    assert restored.state_dict()["names"] == [name for name, _ in model.named_parameters()]
    restored.load_state_dict(strategy.state_dict())
    set_gradients(model)
    restored.step(module for module in [model])
    assert levels(restored) == pytest.approx(LEVELS)


def test_lightning_knows_names_of_an_optimizers_parameters():
    """The callback passes the optimizer's parameters, and the module that names them."""
    model, callback = Model(), ClippingCallback(adagc())
    strategy = callback.strategy
    set_gradients(model)
    strategy._naming_module = model
    strategy.step([model.head.weight, model.embed.weight])
    assert strategy.state_dict()["names"] == ["head.weight", "embed.weight"]


def test_saved_state_holds_plain_values_only():
    strategy = adagc()
    take_steps(strategy, Model())
    state = json.loads(json.dumps(_json(strategy.state_dict())))
    restored = adagc()
    restored.load_state_dict(_tensors(state))
    assert restored.state_dict()["names"] == list(LEVELS)
    assert restored.state_dict()["shapes"] == [[6, 4], [4, 4], [4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("names", [], "names"), ("names", "abcd", "names"), ("names", ["a"], "shapes"), ("names", None, "names"),
        ("names", ["a", "a", "b", "c"], r"names\[1\]"), ("names", [True, 1, 2, 3], r"names\[0\]"),
        ("names", [[], "b", "c", "d"], r"names\[0\]"), ("names", ["a", 1.5, "c", "d"], r"names\[1\]"),
        ("shapes", None, "shapes"), ("shapes", [[1]], "shapes"), ("shapes", [[1], [1], [1], 1], r"shapes\[3\]"),
        ("shapes", [[1], [1], [-1], [1]], r"shapes\[2\]"), ("shapes", [[True], [1], [1], [1]], r"shapes\[0\]"),
        ("shapes", [["x"], [1], [1], [1]], r"shapes\[0\]"),
    ],
)  # fmt: skip
def test_damaged_names_are_refused(key, value, named):
    strategy = adagc()
    take_steps(strategy, Model())
    state = strategy.state_dict() | {key: value}
    with pytest.raises(ValueError, match=f"^the saved AdaGC is damaged: {named}=.* is not allowed: it must be "):
        strategy.load_state_dict(state)
    more = strategy.state_dict()
    more |= {"names": [*LEVELS, "more"], "shapes": [None] * 5}
    with pytest.raises(ValueError, match=r"state\.gamma=a float64 tensor of shape \[4\] is not allowed"):
        strategy.load_state_dict(more)
