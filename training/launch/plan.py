"""What a run will need, computed without allocating any of it: `python train.py model=1b trainer=fsdp plan=true`.

Activations are those that autograd keeps: a block runs on tensors that have a shape and no content, and what it saves
is added up. Whatever else a device holds (kernels, fragmentation, communication buffers) is not in the table.
"""

from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import LlamaConfig
from models.llama import Block
from models.loss import chunk_rows
from models.parallel import SAVED_OPS
from training.config.schema import Config
from training.runtime.hardware import flops_per_token, peak_flops

GIB = 2**30


class Plan(NamedTuple):
    """What a run needs: bytes on each device by what takes them, tokens over all devices, FLOPs of the whole run."""

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


def plan(config: Config) -> Plan:
    """Return what the run of a configuration needs."""
    model, trainer, length = config.model.llama, config.trainer, config.data.sequence_length
    shards, sharded = trainer.dp_shard, trainer.sharded
    mixed = trainer.precision == "bf16-mixed"
    size = 2 if mixed else 4
    tokens = trainer.micro_batch_size * length
    dtype = torch.bfloat16 if mixed and sharded else torch.float32  # other models are in bfloat16 by autocast
    block, selective, within = _activations(model, trainer.micro_batch_size, length, dtype, mixed and not sharded)
    rows = chunk_rows(tokens, model.vocab_size, "cuda" if trainer.accelerator == "gpu" else "cpu")
    mode = trainer.activation_checkpointing
    saved = {"none": within, "selective": selective, "full": tokens * model.hidden_size * dtype.itemsize}[mode]
    whole_gradients = sharded and trainer.grad_accum_steps > 1
    outside_of_blocks = model.parameters - model.num_hidden_layers * block
    in_use = outside_of_blocks + 2 * block if sharded else (model.parameters if mixed else 0)
    memory = {
        "weights": 4 * model.parameters / shards,
        "optimizer": 8 * model.parameters / shards,
        "gradients": 4 * model.parameters * (1 if whole_gradients else 1 / shards),
        "weights in use": size * in_use,
        "activations": model.num_hidden_layers * saved + (within if mode != "none" else 0),
        "loss": (4 * model.vocab_size + 2 * tokens * size) * model.hidden_size + 8 * rows * model.vocab_size,
    }
    if trainer.async_save and trainer.accelerator == "cpu":  # a GPU's copy is in the host's memory
        memory["copy that is saved"] = 12 * model.parameters / shards
    per_step = trainer.global_batch_size * length
    return Plan(memory, per_step, trainer.max_steps, flops_per_token(model, length) * per_step * trainer.max_steps)


def with_possible_batch(config: Config) -> Config:
    """Return the configuration with batch sizes that its processes can share: its own if they can.

    Otherwise the micro-batch is the largest power of two, up to the configured one, that fits `hardware.memory_gib`,
    and the global batch the next multiple of what the processes take at once.
    """
    trainer = config.trainer
    if trainer.global_batch_size % (trainer.micro_batch_size * trainer.world_size) == 0:
        return config
    micro = 1 << (trainer.micro_batch_size.bit_length() - 1)
    while True:
        at_once = micro * trainer.world_size
        batch = -(-trainer.global_batch_size // at_once) * at_once
        sizes = {"micro_batch_size": micro, "global_batch_size": batch}
        possible = config.model_copy(update={"trainer": trainer.model_copy(update=sizes)})
        if micro == 1 or plan(possible).bytes <= config.hardware.memory_gib * GIB:
            return possible
        micro //= 2


def plan_table(configured: Config) -> Table:
    """Return the plan of a run as a table."""
    config = with_possible_batch(configured)
    model, trainer, hardware, needed = config.model, config.trainer, config.hardware, plan(config)
    devices, accumulated = trainer.world_size, trainer.grad_accum_steps
    whole_gradients = trainer.sharded and accumulated > 1
    notes = {
        "weights": "on each device",
        "gradients": "whole: they are reduced after the last micro-batch only" if whole_gradients else "",
        "weights in use": "gathered: two blocks, and what is outside of blocks" if trainer.sharded else "",
    }
    table = Table(title=f"{model.name}: {model.parameters:,} parameters", title_justify="left", show_header=False)
    for name, value in needed.memory.items():
        table.add_row(name, f"{value / GIB:,.2f} GiB", notes.get(name, ""))
    available, room = f"{hardware.memory_gib:g} GiB", hardware.memory_gib - needed.bytes / GIB
    fits = f"fits {available}, {room:,.1f} left" if room > 0 else f"does not fit {available}: {-room:,.1f} too much"
    table.add_row("memory", f"{needed.bytes / GIB:,.2f} GiB", fits)
    if config is not configured:
        table.add_row(
            "batch",
            f"{trainer.global_batch_size:,} sequences",
            f"planned for trainer.global_batch_size={trainer.global_batch_size} and trainer.micro_batch_size="
            f"{trainer.micro_batch_size}: {devices} processes cannot share "
            f"{configured.trainer.global_batch_size} sequences, {configured.trainer.micro_batch_size} each at once",
        )
    at_once = f"{devices} x {trainer.micro_batch_size} sequences at once, {accumulated} time{'s' * (accumulated > 1)}"
    table.add_row("tokens a step", f"{needed.tokens_per_step:,}", at_once)
    table.add_row("steps", f"{needed.steps:,}", f"{needed.tokens_per_step * needed.steps / 1e9:,.3g}B tokens")
    flops = flops_per_token(model, config.data.sequence_length)
    table.add_row("operations a token", f"{flops / 1e9:,.2f}e9", "forward and backward")
    peak = peak_flops(hardware.device)
    assert peak is not None  # `HardwareConfig` checks it
    speed = f"{devices * peak * hardware.mfu / flops:,.0f} tokens/s, {hardware.mfu:.0%} MFU"
    hours = needed.hours(devices, peak, hardware.mfu)
    time = f"{hours:,.3g} hours" if hours >= 1 else f"{hours * 60:,.3g} minutes"
    table.add_row("time", time, f"{speed} on {devices} {hardware.device}")
    return table


def memory_warning(config: Config, available: int) -> str | None:
    """Return a warning if the plan of a run needs more than the available bytes of each process; else `None`."""
    needed = plan(config)
    if needed.bytes <= available:
        return None
    parts = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in needed.memory.items())
    return (
        f"this may run out of memory: {needed.bytes / GIB:,.1f} GiB seem to be needed ({parts}), and there are "
        f"{available / GIB:,.1f}; a smaller trainer.micro_batch_size takes less, or "
        "trainer.activation_checkpointing=full"
    )


class _Results(TorchDispatchMode):
    """Adds up the results of the operations that selective checkpointing keeps.

    To the storages of weights, it adds those of their copies in another dtype.
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

    Weights and input are of `dtype`. The copies of weights that autocast makes do not count.
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
        return sum(parameter.numel() for parameter in block.parameters()), results.bytes + x.nbytes, sum(saved.values())
