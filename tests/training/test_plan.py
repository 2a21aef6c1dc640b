"""Plans: their numbers are the paper's, those of formulas, and those of what autograd saves."""

import io
import re
import shutil

import pytest
import torch
from rich.console import Console

from models import Llama, LlamaConfig
from models.parallel import apply_activation_checkpointing
from tests.helpers import SLOW, compose_config, train
from training.launch.plan import _activations, memory_warning, plan, plan_table, steps_done
from training.run_dir import RunDir
from training.runtime.hardware import PEAK_FLOPS, flops_per_token, peak_flops

SMALL = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip


def saved_bytes(model: Llama, checkpointing: str, autocast: bool = False) -> int:
    """Return the bytes that the blocks save for their backward passes, without weights and copies of weights."""
    apply_activation_checkpointing(model, checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        has_weight_shape = tensor.dim() == 2 and bool({tensor.shape, tensor.T.shape} & shapes)
        is_copy = autocast and tensor.dtype == torch.bfloat16 and has_weight_shape
        if storage.data_ptr() not in weights and not is_copy:
            saved[storage.data_ptr()] = storage  # referenced, so that no other storage gets its address
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
    return sum(storage.nbytes() for storage in saved.values())


def test_planned_activations_are_what_autograd_saves():
    parameters, selective, full = _activations(SMALL, 2, 32, torch.float32)
    assert parameters == sum(p.numel() for p in Llama(SMALL).model.layers[0].parameters())
    angles = 2 * 32 * 8 * 4
    # A block's output is saved as the input of the next; all blocks share the angles.
    assert saved_bytes(Llama(SMALL), "none") == pytest.approx(3 * full - 2 * angles, rel=0.02)
    assert saved_bytes(Llama(SMALL), "full") == pytest.approx(3 * 2 * 32 * 32 * 4, abs=angles)
    mixed = _activations(SMALL, 2, 32, torch.float32, autocast=True)[2]
    assert saved_bytes(Llama(SMALL), "none", autocast=True) == pytest.approx(3 * mixed - 2 * angles, rel=0.02)
    assert _activations(SMALL, 2, 32, torch.bfloat16)[2] < mixed < full
    per_token = 4 * (32 + 2 * 32 + 2 * 16 + 2 * 48 + 2 * 32)  # input; q, attention; k, v; gate, up; o, down
    assert selective == pytest.approx(2 * 32 * per_token, rel=0.05)


def test_plan_of_the_papers_run():
    config = compose_config(
        "model=1b", "trainer=fsdp", "data.sequence_length=2048", "trainer.global_batch_size=2048",
        "trainer.micro_batch_size=8", "trainer.max_steps=11900", "plan=true",
    )  # fmt: skip
    sharded = plan(config)
    assert sharded.tokens_per_step == 4_194_304
    tokens = sharded.steps * sharded.tokens_per_step
    assert tokens == pytest.approx(49.9e9, rel=1e-2)
    assert sharded.flops / tokens == pytest.approx(6.43e9, rel=1e-3)
    assert sharded.memory["weights"] == 4 * 1_071_712_256 / 8 and sharded.memory["optimizer"] == 8 * 1_071_712_256 / 8
    amsgrad = plan(config.model_copy(update={"optim": config.optim.model_copy(update={"amsgrad": True})}))
    assert amsgrad.memory == sharded.memory | {"optimizer": 12 * 1_071_712_256 / 8}
    assert sharded.hours(8, PEAK_FLOPS["H100"], 0.4) == pytest.approx(28.2, abs=0.1)
    unsharded = plan(compose_config("model=1b", "plan=true"))
    assert unsharded.memory["gradients"] == unsharded.memory["weights"] == 4 * 1_071_712_256


def test_flops_count_weights_of_matrix_products():
    tied = LlamaConfig(**{**vars(SMALL), "tie_word_embeddings": True})
    assert flops_per_token(SMALL, 16) == flops_per_token(tied, 16)
    assert flops_per_token(SMALL, 32) - flops_per_token(SMALL, 16) == 12 * 3 * 32 * 16


def test_peak_flops_are_found_by_torchs_device_names():
    names = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12}
    assert {name: peak_flops(name) for name in names} == names
    assert peak_flops("x86_64") is None


def test_plan_is_printed_and_writes_nothing(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("model=1b", "trainer=fsdp", "trainer.global_batch_size=512", "trainer.micro_batch_size=64")
    settings = (*settings, "data.sequence_length=2048", "plan=true")
    done = train(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("1b: 1,071,712,256 parameters", "does not fit 80 GiB", "operations a token", "40% MFU on 8 H100"):
        assert text in done.stdout, done.stdout
    out = io.StringIO()
    Console(file=out, width=120).print(plan_table(compose_config(*settings, "trainer.activation_checkpointing=full")))
    assert "fits 80 GiB" in out.getvalue(), out.getvalue()
    assert "hardware.device=H800 is not allowed: it must be one of H200" in refusal(*settings, "hardware.device=H800")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", [SLOW("basic"), "local", SLOW("slurm")])
def test_plan_of_a_sweep_starts_nothing(launcher, tmp_path):
    done = train("-m", f"hydra/launcher={launcher}", "seed=0,1", "plan=true", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    if launcher != "basic":
        assert "2 runs, computed for" in done.stdout and done.stdout.count("\nsbatch --nodes=1 ") == 2, done.stdout
    assert not (tmp_path / "runs").exists()


def test_steps_before_a_fork_or_a_checkpoint_are_not_counted(tiny, finished_run, tmp_path):
    """A run of 60 steps that begins after step 20 of another trains 40, and so does one with a checkpoint there."""
    base = shutil.copytree(finished_run, tmp_path / "base")
    config = compose_config(*tiny, f"fork_from={base}@20", "trainer.max_steps=60")
    assert steps_done(config, RunDir(tmp_path / "new")) == 20
    needed = plan(config, 20)
    assert (needed.steps, needed.flops) == (40, plan(config).flops * 40 / 60)
    out = io.StringIO()
    Console(file=out, width=120).print(plan_table(config, 20))
    assert re.search(r"steps +│ 40 +│ 2\.05e-05B tokens, without the 20 steps before ", out.getvalue()), out.getvalue()
    assert steps_done(config, RunDir(base)) == 60, "a finished run"
    (base / "result.json").unlink()
    steps = RunDir(base).checkpoint_steps()
    assert steps_done(config, RunDir(base)) == steps[-1] > 20
    RunDir(base).checkpoint(steps[-1]).unlink()
    assert steps_done(compose_config(*tiny), RunDir(base)) == steps[-2]


def test_run_that_cannot_begin_at_a_step_of_another_is_not_planned(tiny, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "runs" / "main" / "base")
    for shown, settings, problem in (
        ("plan=true", ("fork_from=garbage",), "fork_from=garbage is not allowed: it must be a run folder and a step"),
        ("print_run_dir=true", ("fork_from=runs/main/nope@8",), "is not possible: there is no run in runs/main/nope"),
        ("plan=true", ("fork_from=base@8", "trainer.max_steps=8"), "with trainer.max_steps=8: it must be more"),
    ):
        done = train(*tiny, "name=new", *settings, shown, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "") and problem in done.stderr, (settings, done)
        assert done.stderr.count("\n") == 1
    done = train(*tiny, "name=new", "fork_from=base@8", "plan=true", cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"steps +│ 32 +│ .* without the 8 ", done.stdout), done


def test_plan_larger_than_memory_is_a_warning():
    config = compose_config("model=1b", "trainer.micro_batch_size=2")
    needed = plan(config).bytes
    assert memory_warning(config, int(needed) + 1) is None
    warning = memory_warning(config, 10 * 2**30)
    assert warning is not None and warning.startswith(
        f"this may run out of memory: {needed / 2**30:.1f} GiB seem to be needed (weights 4.0, optimizer 8.0, gradients"
    )
    assert warning.endswith("and there are 10.0; a smaller trainer.micro_batch_size takes less, or "
                         "trainer.activation_checkpointing=full")  # fmt: skip
