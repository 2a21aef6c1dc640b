"""A small model, its data and a plain training loop, to compare integrations with."""

import torch
from torch import nn

from zclip import ZClip

STEPS = 24


def batch(step: int) -> torch.Tensor:
    """(8, 5) inputs; those of steps 12 and 19 are spikes."""
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step)) * (40 if step in (12, 19) else 1)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def train_plain(model: nn.Module, optimizer: torch.optim.Optimizer, loss_factor: float = 1.0) -> ZClip:
    """Train for all steps; return the strategy."""
    zclip = ZClip(warmup_steps=5, z_thresh=2.0)
    for t in range(STEPS):
        optimizer.zero_grad()
        (loss_factor * model(batch(t)).square().mean()).backward()
        zclip.step(model)
        optimizer.step()
    return zclip


def assert_same_weights(model: nn.Module, expected: nn.Module, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
