"""What a run will need, computed without allocating any of it: `python train.py model=1b trainer=fsdp plan=true`.

Activations are those that autograd keeps: a block runs on tensors that have a shape and no content, and what it saves
is added up. The memory is that of the moment of a step that needs the most, and within 10 % of what torch's own memory
trackers count (tests/training/test_plan_memory.py). Whatever else a device holds (CUDA's context, kernels,
fragmentation, communication buffers) is not in the table, and compiled blocks save less.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import LlamaConfig
from models.llama import Block
from models.loss import chunk_rows
from models.parallel import SAVED_OPS
from training.checkpoint.fork import fork_step
from training.config.checks import check_batch
from training.config.optimizer import state_bytes
from training.config.schema import Config
from training.run_dir import RunDir
from training.runtime.hardware import flops_per_token, peak_flops

GIB = 2**30


class Plan(NamedTuple):
    """What a run needs: bytes on each device by what takes them, tokens over all devices, FLOPs of all `steps`."""

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


def steps_done(config: Config, run_dir: RunDir) -> int:
    """Return the steps of a run that are not trained again: up to its newest checkpoint, or the step of its fork."""
    if run_dir.result_file.exists():
        return config.trainer.max_steps
    return max([fork_step(config), *run_dir.checkpoint_steps()])


def plan(config: Config, done: int = 0) -> Plan:
    """Return what the run of a configuration needs for its steps after the first `done`, see `steps_done`."""
    trainer = config.trainer
    memory = max(_moments(config), key=lambda moment: sum(moment.values()))
    if trainer.async_save and trainer.accelerator == "cpu":  # a GPU's copy is in the host's memory
        memory["copy that is saved"] = _copied_bytes(config) / trainer.dp_shard
    per_step = trainer.global_batch_size * config.data.sequence_length
    flops = flops_per_token(config.model.llama, config.data.sequence_length)
    steps = trainer.max_steps - done
    return Plan(memory, per_step, steps, flops * per_step * steps)


def _copied_bytes(config: Config) -> float:
    """Return the bytes of weights and optimizer state that a checkpoint has."""
    return 4 * config.model.parameters + state_bytes(config.optim, config.model.llama)


def _moments(config: Config) -> list[dict[str, float]]:
    """Return the memory at the moments of a step that may need the most, in bytes by what takes them.

    They are the end of the forward pass, in the loss; the beginning of the backward pass, in the loss and in the last
    block; and for a sharded model its end, when the gradients outside of blocks are reduced.
    """
    model, trainer, length = config.model.llama, config.trainer, config.data.sequence_length
    mixed, sharded, gpu = trainer.precision == "bf16-mixed", trainer.sharded, trainer.accelerator == "gpu"
    tokens, accumulates = trainer.micro_batch_size * length, trainer.grad_accum_steps > 1
    dtype = torch.bfloat16 if mixed and sharded else torch.float32  # other models are in bfloat16 by autocast
    size = 2 if mixed else 4  # of an element in a matrix product
    hidden = tokens * model.hidden_size * dtype.itemsize
    block = _activations(model, trainer.micro_batch_size, length, dtype, mixed and not sharded, gpu)
    mode, layers = trainer.activation_checkpointing, model.num_hidden_layers
    saved = {"none": block.all, "selective": block.selective, "full": hidden}[mode]

    outside = model.parameters - layers * block.parameters
    if sharded:
        in_use = size * (outside + 2 * block.parameters)
    else:
        in_use = size * block.parameters * (layers if mode == "none" else 1) if mixed else 0  # copies by autocast
    gradients = 4 * model.parameters / (1 if sharded and accumulates else trainer.dp_shard)
    base = {
        "weights": 4 * model.parameters / trainer.dp_shard,
        "optimizer": state_bytes(config.optim, model) / trainer.dp_shard,
        "gradients": gradients,
        "weights in use": in_use,
        "activations": layers * saved + 2 * hidden,  # with the final norm's input and output
    }
    head = model.vocab_size * model.hidden_size
    logits = chunk_rows(tokens, model.vocab_size, "cuda" if gpu else "cpu") * model.vocab_size
    # The head's gradient and copy; the input and its gradient; of a chunk the logits, also in float32, their
    # log-probabilities and gradient, and the gradient of the chunk before.
    loss = (4 + (size if mixed and not sharded else 0)) * head + 2 * size * tokens * model.hidden_size
    forward = base | {"loss": loss + (14 if mixed else 12) * logits}
    # The gradients of the step before are freed by now. A block's are reduced while those of the next are computed,
    # of whose feed-forward part the first two are there with what the block has saved.
    current = gradients if accumulates or sharded else 0
    in_flight = 4 * block.parameters if sharded else 0
    products: dict[str, float] = {"gradients": current, "loss": 8 * head + 2 * hidden}
    last_block = {
        "gradients": current + in_flight,
        "activations": base["activations"] + block.all - saved + 2 * size * tokens * model.intermediate_size,
        "loss": (size if sharded else 4) * head,
    }
    reduced: dict[str, float] = {"gradients": gradients + (size + 4) * outside, "activations": 0}
    if sharded:  # no block is gathered then
        products["weights in use"] = reduced["weights in use"] = size * outside
    return [forward, base | products, base | last_block, *([base | reduced] if sharded else [])]


def with_possible_batch(config: Config) -> Config:
    """Return the configuration with batch sizes that its processes can share: its own if they can.

    Otherwise the micro-batch is the largest power of two, up to the configured one, that fits `hardware.memory_gib`,
    and the global batch the next multiple of what the processes take at once. A run with `fork_from` keeps its global
    batch.

    Raises:
        ConfigError: there are none, because the batch is that of another run, or that of `resume`.
    """
    trainer, is_fork = config.trainer, config.fork_from is not None
    if trainer.global_batch_size % (trainer.micro_batch_size * trainer.world_size) == 0:
        return config
    if config.resume is not None or (is_fork and trainer.global_batch_size % trainer.world_size):
        check_batch(trainer)
    micro = 1 << (trainer.micro_batch_size.bit_length() - 1)
    while True:
        at_once = micro * trainer.world_size
        batch = -(-trainer.global_batch_size // at_once) * at_once
        sizes = {"micro_batch_size": micro, "global_batch_size": batch}
        possible = config.model_copy(update={"trainer": trainer.model_copy(update=sizes)})
        allowed = not is_fork or batch == trainer.global_batch_size
        if micro == 1 or (allowed and plan(possible).bytes <= config.hardware.memory_gib * GIB):
            return possible
        micro //= 2


def plan_table(configured: Config, done: int = 0) -> Table:
    """Return the plan of a run as a table, for its steps after the first `done`, see `steps_done`."""
    config = with_possible_batch(configured)
    model, trainer, hardware, needed = config.model, config.trainer, config.hardware, plan(config, done)
    devices, accumulated = trainer.world_size, trainer.grad_accum_steps
    whole_gradients = trainer.sharded and accumulated > 1
    notes = {
        "weights": "on each device",
        "gradients": "whole: they are reduced after the last micro-batch only" if whole_gradients else "",
        "weights in use": "gathered from the other processes" if trainer.sharded else "",
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
    before = f", without the {done:,} steps before" if done else ""
    table.add_row("steps", f"{needed.steps:,}", f"{needed.tokens_per_step * needed.steps / 1e9:,.3g}B tokens{before}")
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


class BlockMemory(NamedTuple):
    """The parameters of a block, and the bytes that it keeps for its backward pass."""

    parameters: int
    selective: int
    all: int


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


def use_gpu_norms(module: nn.Module) -> None:
    """Make the norms in a module, whose tensors have no content, save what they save on a GPU.

    There torch runs one kernel, which saves its input and a number per row. On a CPU it takes several steps and saves
    float32 intermediates, and so it does on a GPU if the dtype of the input is not that of the weight.
    """
    for norm in module.modules():
        if isinstance(norm, nn.RMSNorm):
            norm.forward = partial(_gpu_norm, norm)  # type: ignore[method-assign]


def _gpu_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype:
        return nn.functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
    return _FusedNorm.apply(x, norm.weight)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _activations(
    config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, autocast: bool = False, gpu: bool = False
) -> BlockMemory:
    """Return the memory of a block whose weights and input are of `dtype`.

    The copies of weights that autocast makes do not count.
    """
    with FakeTensorMode():
        block = Block(config)
        if gpu:
            use_gpu_norms(block)
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
        return BlockMemory(parameters, results.bytes + x.nbytes, sum(saved.values()))
