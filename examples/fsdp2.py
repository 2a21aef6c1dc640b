"""ZClip with FSDP2: the norm is that of the whole model, and all processes make the same decisions.

torchrun --nproc-per-node 2 examples/fsdp2.py           # on GPUs with NCCL, otherwise on the CPU with gloo
torchrun --nproc-per-node 2 examples/fsdp2.py ddp       # the same with DDP
python examples/fsdp2.py                                # one process, for comparison
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import TinyLM, make_batches

from zclip import ZClip


def main(wrapper: str) -> None:
    """Train on this process's share of each batch."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device != "cpu" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = TinyLM().to(device)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(torch.device(device).type, (world,))
        for part in (model.block, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    zclip = ZClip()
    for step, batch in enumerate(make_batches().to(device)):
        model(batch.chunk(world)[rank]).backward()
        zclip.step(model, optimizer=optimizer)  # on all processes
        optimizer.step()
        optimizer.zero_grad()
        row = zclip.read_telemetry()
        if row["z"] > 10:
            norms = f"norm {row['grad_norm']:.2f} -> {row['clipped_norm']:.2f}"
            print(f"process {rank} of {world}, step {step}: {norms}, z-score {row['z']:.1f}\n", end="", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:] or ["fsdp2"])
    dist.destroy_process_group()  # after the model is freed, which uses the group
