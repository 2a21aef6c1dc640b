"""What a run will need, computed without allocating any of it: `python train.py model=1b trainer=fsdp plan=true`.

Activations are those that autograd keeps: a block runs on tensors that have a shape and no content, and what it saves
is added up. Whatever else a device holds (kernels, fragmentation, communication buffers) is not in the table.
"""

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import LlamaConfig
from models.llama import Block
from models.loss import chunk_rows
from models.parallel import SAVED_OPS
from training.config.checks import model_config
from training.config.parallelism import micro_batches, sharded, shards, world_size
from training.launch.sweep import Job
from training.runtime.hardware import flops_per_token, peak
from training.runtime.slurm import size

GIB = 2**30


class Plan(NamedTuple):
    """What a run needs.

    Attributes:
        memory: bytes on each device, by what takes them.
        tokens_per_step: over all devices.
        steps: of the run.
        flops: of the whole run.
    """

    memory: dict[str, float]
    tokens_per_step: int
    steps: int
    flops: float

    @property
    def bytes(self) -> float:
        """All memory on each device."""
        return sum(self.memory.values())

    def hours(self, devices: int, peak: float, mfu: float) -> float:
        """Return how long the run takes where each device does a share `mfu` of `peak` operations a second."""
        return self.flops / (devices * peak * mfu) / 3600


def plan(cfg: DictConfig) -> Plan:
    """Return what the run of a configuration needs."""
    config, trainer, length = model_config(cfg), cfg.trainer, cfg.data.sequence_length
    spread = shards(cfg)
    mixed = trainer.precision == "bf16-mixed"
    autocast = mixed and not sharded(cfg)  # a sharded model is in bfloat16 itself
    size = 2 if mixed else 4
    tokens = trainer.micro_batch_size * length
    dtype = torch.bfloat16 if mixed and not autocast else torch.float32
    block, kept, within = _activations(config, trainer.micro_batch_size, length, dtype, autocast)
    rows = chunk_rows(tokens, config.vocab_size, "cuda" if trainer.accelerator == "gpu" else "cpu")
    how = trainer.activation_checkpointing
    rest = config.parameters - config.num_hidden_layers * block
    head = config.vocab_size * config.hidden_size
    saved = {"none": within, "selective": kept, "full": tokens * config.hidden_size * dtype.itemsize}[how]
    memory = {
        "weights": 4 * config.parameters / spread,
        "optimizer": 8 * config.parameters / spread,
        "gradients": 4 * config.parameters * (1 if sharded(cfg) and micro_batches(cfg) > 1 else 1 / spread),
        "weights in use": size * (rest + 2 * block) if sharded(cfg) else (size * config.parameters if mixed else 0),
        "activations": config.num_hidden_layers * saved + (within if how != "none" else 0),
        "loss": 4 * head + 2 * tokens * config.hidden_size * size + 8 * rows * config.vocab_size,
    }
    if trainer.async_save and trainer.accelerator == "cpu":  # that of a GPU's memory is in the host's
        memory["copy that is saved"] = 12 * config.parameters / spread
    per_step = trainer.global_batch_size * length
    return Plan(memory, per_step, trainer.max_steps, flops_per_token(config, length) * per_step * trainer.max_steps)


def show(cfg: DictConfig) -> Table:
    """Return the plan as a table."""
    config, found, devices = model_config(cfg), plan(cfg), world_size(cfg)
    table = Table(title=f"{cfg.model.name}: {config.parameters:,} parameters", title_justify="left", show_header=False)
    for name, value in found.memory.items():
        table.add_row(name, f"{value / GIB:,.2f} GiB", _remark(name, cfg))
    available, room = cfg.hardware.memory_gib, cfg.hardware.memory_gib - found.bytes / GIB
    fits = (
        f"fits {available:g} GiB, {room:,.1f} left"
        if room > 0
        else f"does not fit {available:g} GiB: {-room:,.1f} too much"
    )
    table.add_row("memory", f"{found.bytes / GIB:,.2f} GiB", fits)
    accumulated = micro_batches(cfg)
    at_once = (
        f"{devices} x {cfg.trainer.micro_batch_size} sequences at once, {accumulated} time{'s' * (accumulated > 1)}"
    )
    table.add_row("tokens a step", f"{found.tokens_per_step:,}", at_once)
    table.add_row("steps", f"{found.steps:,}", f"{found.tokens_per_step * found.steps / 1e9:,.3g}B tokens")
    each = flops_per_token(config, cfg.data.sequence_length)
    table.add_row("operations a token", f"{each / 1e9:,.2f}e9", "forward and backward")
    fastest = peak(cfg.hardware.device)
    if fastest is not None:
        rate = devices * fastest * cfg.hardware.mfu / each
        table.add_row("time", f"{found.hours(devices, fastest, cfg.hardware.mfu):,.3g} hours",
                      f"{rate:,.0f} tokens/s, {cfg.hardware.mfu:.0%} MFU on {devices} {cfg.hardware.device}")  # fmt: skip
    return table


def show_several(jobs: Sequence[Job]) -> tuple[Table, list[str]]:
    """Return the plans of the runs of a sweep as a table, and the lines that submit them to SLURM."""
    first = jobs[0].cfg
    total_tokens = total_hours = 0.0
    fastest = peak(first.hardware.device)
    table = Table(title=f"{len(jobs)} runs, computed for {first.hardware.mfu:.0%} MFU", title_justify="left")
    for column in ("run", "tokens", f"hours of {first.hardware.device}", "GiB on each"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    lines = []
    for job in jobs:
        found, devices = plan(job.cfg), world_size(job.cfg)
        tokens = found.tokens_per_step * found.steps
        hours = 0.0 if fastest is None else devices * found.hours(devices, fastest, job.cfg.hardware.mfu)
        total_tokens, total_hours = total_tokens + tokens, total_hours + hours
        table.add_row(job.title, f"{tokens / 1e9:,.3g}B", f"{hours:,.3g}", f"{found.bytes / GIB:,.1f}")
        kept = [override for override in job.overrides if not override.lower().startswith("plan=")]
        lines.append(shlex.join(["sbatch", *size(job.cfg.trainer), "scripts/slurm/train.sbatch", *kept]))
    table.add_section()
    table.add_row("all", f"{total_tokens / 1e9:,.4g}B", f"{total_hours:,.4g}", "")
    return table, lines


def _remark(name: str, cfg: DictConfig) -> str:
    """Say what is not obvious about a row."""
    if name == "weights":
        return "on each device"
    if name == "gradients" and sharded(cfg) and micro_batches(cfg) > 1:
        return "whole: they are reduced after the last micro-batch only"
    if name == "weights in use" and sharded(cfg):
        return "gathered: two blocks, and what is outside of blocks"
    return ""


def tight(cfg: DictConfig, there: int) -> str | None:
    """Return a warning if the plan of a run needs more than the bytes that are there for each process."""
    found = plan(cfg)
    if found.bytes <= there:
        return None
    parts = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in found.memory.items())
    return (
        f"this may run out of memory: {found.bytes / GIB:,.1f} GiB seem to be needed ({parts}), and there are "
        f"{there / GIB:,.1f}; a smaller trainer.micro_batch_size takes less, or trainer.activation_checkpointing=full"
    )


class _Results(TorchDispatchMode):
    """Adds up the results of the operations that selective checkpointing keeps.

    Args:
        weights: storages of weights; those of their copies in another dtype are added.
    """

    def __init__(self, weights: dict[int, Any]) -> None:
        super().__init__()
        self.bytes = 0
        self.weights = weights

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            storage = out.untyped_storage()
            self.weights[storage._cdata] = storage  # held, so that no other gets its number
        if function in SAVED_OPS:
            found = out if isinstance(out, tuple) else (out,)
            self.bytes += sum(t.nbytes for t in found if isinstance(t, torch.Tensor))
        return out


def _activations(
    config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, autocast: bool = False
) -> tuple[int, int, int]:
    """Return a block's parameters, and the bytes that it keeps for its backward pass: selectively, and by itself.

    Args:
        config, batch, length: of the model and its input.
        dtype: of weights and input.
        autocast: whether operations are done in bfloat16 where autocast does so; copies of weights do not count.
    """
    with FakeTensorMode():
        block = Block(config)
        for parameter in block.parameters():
            parameter.data = torch.empty(parameter.shape, dtype=dtype)
        own = {parameter.untyped_storage()._cdata: parameter for parameter in block.parameters()}
        saved: dict[int, int] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        x = torch.empty(batch, length, config.hidden_size, dtype=dtype, requires_grad=True)
        angles = torch.empty(length, config.head_dim, dtype=dtype)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with mixed, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), _Results(own) as results:
            out = block(x, angles, angles)
        assert out.requires_grad
        parameters = sum(parameter.numel() for parameter in block.parameters())
        return parameters, results.bytes + x.nbytes, sum(saved.values())
