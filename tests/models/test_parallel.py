"""Recomputed activations, sharding and compilation change neither the loss, nor gradients, nor names."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import Llama, LlamaConfig
from models.parallel import (
    apply_activation_checkpointing,
    apply_fsdp,
    compile_model,
    copy_full_weight,
    materialize,
    set_gradient_sync,
)

LAYERS = 2
TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


def new_model(**changes: int) -> Llama:
    torch.manual_seed(0)
    return Llama(TINY.model_copy(update=changes))


def loss_and_grads(model: Llama, divisor: int = 1) -> dict[str, torch.Tensor]:
    """The loss and the gradients by the names of the parameters."""
    tokens = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(1))
    loss, _ = model(tokens[:, :-1], tokens[:, 1:])
    (loss / divisor).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {"loss": loss.detach(), **{name.replace("_checkpoint_wrapped_module.", ""): g for name, g in full.items()}}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


class Operations(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations(mode: str) -> Counter[str]:
    model = new_model()
    apply_activation_checkpointing(model, mode)
    with Operations() as counted:
        loss_and_grads(model)
    return counted.calls


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputed_activations_change_neither_loss_nor_gradients_nor_names(mode):
    expected, model = loss_and_grads(new_model()), new_model()
    names = model.state_dict().keys()
    apply_activation_checkpointing(model, mode)
    assert model.state_dict().keys() == names
    assert_same(loss_and_grads(model), expected)


def test_matrix_products_and_attention_are_recomputed_in_full_mode_only():
    saved, selective, full = (operations(mode) for mode in ("none", "selective", "full"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert saved["silu"] == LAYERS and saved[attention] == LAYERS
    assert selective["silu"] == full["silu"] == 2 * LAYERS
    assert selective["mm"] == saved["mm"] and selective[attention] == LAYERS
    assert full["mm"] >= saved["mm"] + 6 * LAYERS and full[attention] == 2 * LAYERS


@pytest.mark.parametrize("tied", [False, True])
def test_model_is_materialized_with_its_ties(tied):
    with torch.device("meta"):
        model = Llama(TINY.model_copy(update={"tie_word_embeddings": tied}))
    materialize(model, torch.device("cpu"))
    assert not any(p.is_meta for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    expected = new_model(tie_word_embeddings=tied)
    for drawn in (model, expected):
        torch.manual_seed(0)
        drawn.init_weights()
    assert_same(loss_and_grads(model), loss_and_grads(expected))


@pytest.fixture
def mesh(tmp_path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_model_has_the_loss_and_gradients_of_the_whole(mesh):
    """On one rank; tests/distributed has several."""
    expected, model = loss_and_grads(new_model()), new_model()
    apply_fsdp(model, mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_same(loss_and_grads(model), expected)


def test_gradients_of_a_sharded_model_are_reduced_when_asked(mesh):
    expected, model = loss_and_grads(new_model()), new_model()
    apply_fsdp(model, mesh)
    set_gradient_sync(model, False)
    loss_and_grads(model, divisor=2)
    assert all(p.grad is None for p in model.parameters())
    set_gradient_sync(model, True)
    assert_same(loss_and_grads(model, divisor=2), expected)


def test_full_weight_is_copied_into_a_parameter_sharded_or_not(mesh):
    plain, sharded = new_model(), new_model()
    apply_fsdp(sharded, mesh)
    for model in (plain, sharded):
        parameter = model.lm_head.weight
        weight = torch.randn(97, 32)
        with torch.no_grad():
            copy_full_weight(parameter, weight)
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(full, weight)


@pytest.mark.slow
def test_compiled_model_has_the_loss_gradients_and_names_of_the_model():
    expected, model = loss_and_grads(new_model(num_hidden_layers=1)), new_model(num_hidden_layers=1)
    names = model.state_dict().keys()
    compile_model(model)
    assert model.state_dict().keys() == names
    assert_same(loss_and_grads(model), expected)
