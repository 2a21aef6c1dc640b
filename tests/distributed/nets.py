"""A small model, whole and sharded, for the tests in several processes."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """Two named linear layers for a tensor-parallel plan, with sizes that do not divide evenly."""

    def __init__(self, width: int = 18) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, width)
        self.down = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def fsdp2_net(world: int) -> Net:
    model = Net()
    mesh = init_device_mesh("cpu", (world,))
    for part in (model.up, model.down, model):
        fully_shard(part, mesh=mesh)
    return model


def net_on_two_meshes(world: int) -> Net:
    """One layer is sharded over all ranks, the other over pairs."""
    model = Net()
    fully_shard(model.up, mesh=init_device_mesh("cpu", (world,)))
    pairs = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.down, mesh=pairs)
    return model


def net_in_two_dimensions(world: int) -> nn.Module:
    """Tensor parallelism over half of the ranks, and FSDP2 over the two halves."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "model"))
    model = parallelize_module(Net(), mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return model


def full_parameters(model: nn.Module) -> torch.Tensor:
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])
