"""Two real gloo processes with FSDP2: norm, gradients and decisions are those of one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zclip import ZClip

STEPS = 12


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 3))


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 6, generator=generator) * (30 if step == 9 else 1)


def train(model: nn.Module, rank: int = 0, world: int = 1) -> tuple[list[float], list[float], torch.Tensor]:
    zclip = ZClip(warmup_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norms, coefficients = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step).chunk(world)[rank]).square().mean().backward()
        norms.append(float(zclip.step(model)))
        coefficients.append(float(zclip.telemetry["coefficient"]))
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return norms, coefficients, torch.cat([p.detach().flatten() for p in whole])


def worker(rank: int, port: int, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = build()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(train(model, rank, 2), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_fsdp2_decides_and_moves_like_one_process(tmp_path, free_port):
    norms, coefficients, parameters = train(build())
    assert min(coefficients) < 1, "the batch of step 9 is a spike"
    mp.spawn(worker, args=(free_port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        sharded = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(torch.tensor(sharded[0]), torch.tensor(norms), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(sharded[1]), torch.tensor(coefficients), rtol=1e-5, atol=0)
        torch.testing.assert_close(sharded[2], parameters, rtol=1e-5, atol=1e-7)
