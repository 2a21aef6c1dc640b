"""The plan's numbers are those of the paper, of formulas, and of what autograd really keeps."""

import pytest
import torch

from models import Llama, LlamaConfig
from models.parallel import apply_activation_checkpointing
from tests.conftest import train
from tests.training.test_config import composed
from training.launch.plan import _activations, plan, tight
from training.runtime.hardware import PEAK_FLOPS, flops_per_token, peak

SMALL = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip


def saved_bytes(model: Llama, how: str, autocast: bool = False) -> int:
    """Bytes of storages, weights and their copies aside, that forward of the blocks leaves for backward."""
    apply_activation_checkpointing(model, how)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        of_weight = tensor.dim() == 2 and bool({tensor.shape, tensor.T.shape} & shapes)
        copied = autocast and tensor.dtype == torch.bfloat16 and of_weight
        if storage.data_ptr() not in own and not copied:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    shapes = {parameter.shape for parameter in model.model.layers.parameters() if parameter.dim() == 2}
    x = torch.randn(2, 32, 32, requires_grad=True)
    angles = torch.randn(32, 8)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        for layer in model.model.layers:
            x = layer(x, angles, angles)
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_those_that_autograd_keeps():
    parameters, selective, whole = _activations(SMALL, 2, 32, torch.float32)
    assert parameters == sum(p.numel() for p in Llama(SMALL).model.layers[0].parameters())
    angles = 2 * 32 * 8 * 4
    # A block's output is kept as the input of the next, and the angles once for all.
    assert saved_bytes(Llama(SMALL), "none") == pytest.approx(3 * whole - 2 * angles, rel=0.02)
    assert saved_bytes(Llama(SMALL), "full") == pytest.approx(3 * 2 * 32 * 32 * 4, abs=angles)
    mixed = _activations(SMALL, 2, 32, torch.float32, autocast=True)[2]
    assert saved_bytes(Llama(SMALL), "none", autocast=True) == pytest.approx(3 * mixed - 2 * angles, rel=0.02)
    assert _activations(SMALL, 2, 32, torch.bfloat16)[2] < mixed < whole
    per_token = 4 * (32 + 2 * 32 + 2 * 16 + 2 * 48 + 2 * 32)  # input; q, attention; k, v; gate, up; o, down
    assert selective == pytest.approx(2 * 32 * per_token, rel=0.05)


def test_the_papers_run():
    cfg = composed(
        "model=1b", "trainer=fsdp", "data.sequence_length=2048", "trainer.global_batch_size=2048",
        "trainer.micro_batch_size=8", "trainer.max_steps=11900", "plan=true",
    )  # fmt: skip
    found = plan(cfg)
    assert found.tokens_per_step == 4_194_304 and found.steps * found.tokens_per_step == pytest.approx(49.9e9, rel=1e-2)
    assert found.flops / (found.steps * found.tokens_per_step) == pytest.approx(6.43e9, rel=1e-3)
    assert found.memory["weights"] == 4 * 1_071_712_256 / 8 and found.memory["optimizer"] == 8 * 1_071_712_256 / 8
    assert found.hours(8, PEAK_FLOPS["H100"], 0.4) == pytest.approx(28.2, abs=0.1)
    alone = plan(composed("model=1b", "plan=true"))
    assert alone.memory["gradients"] == alone.memory["weights"] == 4 * 1_071_712_256


def test_operations_count_what_is_multiplied():
    tied = LlamaConfig(**{**vars(SMALL), "tie_word_embeddings": True})
    assert flops_per_token(SMALL, 16) == flops_per_token(tied, 16)
    assert flops_per_token(SMALL, 32) - flops_per_token(SMALL, 16) == 12 * 3 * 32 * 16


def test_devices_are_told_by_torchs_names():
    names = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12}
    assert {name: peak(name) for name in names} == names
    assert peak("x86_64") is None


def test_a_plan_is_shown_and_leaves_nothing(tmp_path):
    settings = ("model=1b", "trainer=fsdp", "trainer.global_batch_size=512", "trainer.micro_batch_size=64")
    settings = (*settings, "data.sequence_length=2048", "plan=true")
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("1b: 1,071,712,256 parameters", "does not fit 80 GiB", "operations a token", "40% MFU on 8 H100"):
        assert said in done.stdout, done.stdout
    assert "fits 80 GiB" in train(*settings, "trainer.activation_checkpointing=full", cwd=tmp_path).stdout
    wrong = train(*settings, "hardware.device=H800", cwd=tmp_path)
    assert wrong.returncode == 2 and "hardware.device=H800 is not allowed: it must be one of H200" in wrong.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_whose_plan_is_too_large_begins_with_a_warning():
    cfg = composed("model=1b", "trainer.micro_batch_size=2")
    needed = plan(cfg).bytes
    assert tight(cfg, int(needed) + 1) is None
    said = tight(cfg, 10 * 2**30)
    assert said is not None and said.startswith(
        f"this may run out of memory: {needed / 2**30:.1f} GiB seem to be needed (weights 4.0, optimizer 8.0, gradients"
    )
    assert said.endswith("and there are 10.0; a smaller trainer.micro_batch_size takes less, or "
                         "trainer.activation_checkpointing=full")  # fmt: skip
