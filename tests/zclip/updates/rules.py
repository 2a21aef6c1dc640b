"""Rules, optimizers, gradients and norms that the tests of rules over updates share."""

import math
import random

import torch
from torch import nn

from tests.zclip.transcriptions import UpdateBrakeEquations, UpdateClipEquations
from zclip.updates import UpdateBrake, UpdateClip, UpdateDecision, UpdateRule

LR, DECAY = 0.02, 0.1
SHORT_BRAKE = {
    "margin": 1.1,
    "release": 0.9,
    "sigmas": 0.3,
    "rise_steps": 100,
    "fall_steps": 3,
    "warmup_steps": 5,
    "recovery_window": 12,
}
RULES = {
    "clip": (lambda: UpdateClip(sigmas=0.5, window=8), lambda: UpdateClipEquations(sigmas=0.5, window=8)),
    "brake": (lambda: UpdateBrake(**SHORT_BRAKE), lambda: UpdateBrakeEquations(**SHORT_BRAKE)),
}
OPTIMIZERS = {
    "adamw": lambda p, lr=LR: torch.optim.AdamW(p, lr=lr, weight_decay=DECAY),
    "fused": lambda p, lr=LR: torch.optim.AdamW(p, lr=lr, weight_decay=DECAY, fused=True),
    "sgd": lambda p, lr=LR: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


def batch(step: int) -> torch.Tensor:
    """(8, 5) inputs, which grow in steps 20 to 25."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return x * (30.0 if 20 <= step < 26 else 1.0)


def backward(model: nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    for p in model.parameters():
        p.grad = None
    loss = model(batch(step)).square().mean()
    (scale * loss).backward()
    return loss.detach()


def growing_norms(seed: int, steps: int) -> list[float]:
    """Log-normal norms that fall, with outliers, a run-up and a lasting rise, and a few that are no norms."""
    draw, norms = random.Random(seed), []
    for t in range(steps):
        level = (
            5.0 * math.exp(-t / 60) + (3.0 if t > 0.8 * steps else 1.0) + (0.02 * (t % 90 - 60) if t % 90 > 60 else 0)
        )
        norms.append(level * math.exp(draw.gauss(0, 0.1)) * (20.0 if t % 83 == 82 else 1.0))
    for t, value in ((7, math.nan), (70, math.inf), (71, 0.0), (120, math.nan)):
        norms[t] = value
    return norms


class Half(UpdateRule):
    """Always half the rate."""

    def decide(self, norm, state):
        return UpdateDecision(torch.full_like(norm, 0.5), norm > 0, norm * 0.5, {})
