"""On a GPU: no step of Lightning's loop waits for the device, and a rank of DDP and FSDP2 over NCCL trains the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import Batch
from tests.helpers import CHECKOUT, compose_config, read_jsonl, start_from_nothing
from training.module import PretrainingModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "trainer.log_every=10", "trainer.max_steps=20")
#: The environment of the only rank of a launcher.
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671"}

#: A program that runs train.py, and in which a step raises an error if it waits for the GPU.
NO_SYNC = """
import runpy, sys, torch
from training.callback import RunCallback

def between(name, mode, inner):
    def hook(self, trainer, module, *args):
        if mode == "default":
            torch.cuda.set_sync_debug_mode(mode)
        inner(self, trainer, module, *args)
        if mode == "error" and trainer.global_step >= 3:  # the first steps allocate
            torch.cuda.set_sync_debug_mode(mode)
    setattr(RunCallback, name, hook)

between("on_train_batch_start", "error", RunCallback.on_train_batch_start)
between("on_train_batch_end", "default", RunCallback.on_train_batch_end)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def gpu_run(folder: Path, *settings: str, env: dict[str, str] | None = None) -> list[float]:
    """Train on the GPU in a process of its own, and return the losses."""
    process = start_from_nothing(*settings, *GPU, f"paths.runs={folder}", "name=run", cwd=folder, **(env or {}))
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    return [row["loss"] for row in read_jsonl(folder / "main" / "run" / "metrics.jsonl")]


def test_no_step_waits_for_the_gpu(tiny, tmp_path):
    program = tmp_path / "no_sync.py"
    program.write_text(NO_SYNC)
    command = [sys.executable, str(program), str(CHECKOUT / "train.py"), *tiny, *GPU, "name=run"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_batches_are_copied_from_pinned_memory():
    module = PretrainingModule(compose_config("model=nano"), fresh=False)
    batch = Batch(torch.zeros(64, 1025, dtype=torch.int32))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        copied = module.transfer_batch_to_device(batch, torch.device("cuda"), 0)
        torch.cuda.synchronize()
    assert copied.tokens.is_cuda and copied.targets is None
    assert any("Pinned -> Device" in event.name for event in profile.events())


def test_a_rank_of_ddp_and_fsdp_over_nccl_trains_as_one_process_does(tiny, tmp_path):
    strategies = {"single": (), "ddp": (), "fsdp": ("trainer.compile=true",)}
    losses = {}
    for strategy, more in strategies.items():
        folder = tmp_path / strategy
        folder.mkdir()
        env = RANK if strategy != "single" else None
        losses[strategy] = gpu_run(folder, *tiny, f"trainer.strategy={strategy}", *more, env=env)
    assert losses["single"][-1] < losses["single"][0]
    assert losses["ddp"] == pytest.approx(losses["single"], rel=1e-3)
    assert losses["fsdp"] == pytest.approx(losses["single"], rel=0.02)  # its activations are bfloat16 throughout
