"""The small model, its data and the plain training loop that the integrations are compared with."""

import socket

import torch
from torch import nn

from zclip import ZClip

STEPS = 24


def batch(step: int) -> torch.Tensor:
    """(8, 5) inputs; those of steps 12 and 19 are spikes."""
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step)) * (40 if step in (12, 19) else 1)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> ZClip:
    """Train on all steps, and return the clipper."""
    zclip = ZClip(warmup_steps=5, z_thresh=2.0)
    for t in range(STEPS):
        optimizer.zero_grad()
        (factor * model(batch(t)).square().mean()).backward()
        zclip.step(model)
        optimizer.step()
    return zclip


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
