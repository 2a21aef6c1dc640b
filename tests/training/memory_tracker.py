"""The peak memory of a training step by torch's own memory trackers, on tensors that have a shape and no content."""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import Llama, loss, parallel
from training.config.schema import Config
from training.launch.plan import use_gpu_norms


def peak_bytes(config: Config) -> int:
    """Return the bytes that rank 0 needs at most in a step which is not the first one.

    The step is Lightning's: it frees the gradients of the step before after the forward pass, and autocast keeps no
    copies of weights. Clipping is not in it: it allocates a number per parameter. Tensors are on the CPU, where torch
    saves the same as on a GPU but for RMSNorm; chunks of logits have the GPU's size.
    """
    trainer, rows = config.trainer, loss.MAX_LOGITS["cpu"]
    if trainer.sharded:
        dist.init_process_group("fake", rank=0, world_size=trainer.world_size, store=FakeStore())
        mesh = init_device_mesh("cpu", (trainer.dp_replicate, trainer.dp_shard), mesh_dim_names=("replicate", "shard"))
        mesh = mesh if trainer.strategy == "hsdp" else mesh["shard"]
    try:
        loss.MAX_LOGITS["cpu"] = loss.MAX_LOGITS["cuda"]
        with torch.device("meta"):
            model = Llama(config.model.llama)
        use_gpu_norms(model)
        parallel.apply_activation_checkpointing(model, trainer.activation_checkpointing)
        with FakeTensorMode():
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device="cpu")))
            if trainer.sharded:
                parallel.apply_fsdp(model, mesh, torch.bfloat16)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True, amsgrad=config.optim.amsgrad)
            moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if config.optim.amsgrad else ()))
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
                optimizer.state[parameter] = {n: torch.empty_like(parameter) for n in moments}
            if trainer.sharded:
                tracker = FSDPMemTracker(model, optimizer)
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
            with tracker:
                _step(config, model, optimizer, tracker)
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    finally:
        loss.MAX_LOGITS["cpu"] = rows
        if trainer.sharded:
            dist.destroy_process_group()


def _step(config: Config, model: Llama, optimizer: torch.optim.Optimizer, tracker: MemTracker) -> None:
    trainer = config.trainer
    for number in range(min(2, trainer.grad_accum_steps)):  # more of them need no more
        last = number + 1 == min(2, trainer.grad_accum_steps)
        parallel.set_gradient_sync(model, last)
        tracker.reset_mod_stats()
        tokens = torch.zeros(trainer.micro_batch_size, config.data.sequence_length + 1, dtype=torch.long)
        mixed = not trainer.sharded
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
            loss_value, _ = model(tokens[:, :-1], tokens[:, 1:])
        if number == 0:
            optimizer.zero_grad()
        loss_value.backward()
