"""Traces of gradient norms, and their replay through a strategy, many traces at once."""

import math
import random
from typing import NamedTuple

import numpy as np
import torch

from zclip import ClippingStrategy
from zclip.decision import GradStats


def spiky_norms(seed: int, steps: int) -> list[float]:
    """A drifting level with 10 % noise, and one step in fifty up to 20 times as large."""
    draw = random.Random(seed)
    level, trace = 1.0, []
    for _ in range(steps):
        level *= math.exp(draw.gauss(0, 0.01))
        spike = draw.uniform(2, 20) if draw.random() < 0.02 else 1.0
        trace.append(level * math.exp(draw.gauss(0, 0.1)) * spike)
    return trace


class Lanes(NamedTuple):
    """Result of replaying several traces: arrays of shape (traces, steps).

    Attributes:
        coefficients: factor on the gradients of each step.
        telemetry: the rule's own telemetry of each step, by name.
        state: the statistics after each step, by name; a statistic that is not 0-dim has further dimensions.
    """

    coefficients: np.ndarray
    telemetry: dict[str, np.ndarray]
    state: dict[str, np.ndarray]

    @property
    def spikes(self) -> np.ndarray:
        return self.telemetry["spike"]


def replay_lanes(strategy: ClippingStrategy, traces: np.ndarray) -> Lanes:
    """Replay traces of finite norms, (traces, steps) in float64, each from new statistics.

    A rule is a pure function of tensors: `torch.func.vmap` makes the decisions of one step for all traces at once.
    """

    def rule(norm: torch.Tensor, state: dict[str, torch.Tensor]):
        result = strategy.clip(GradStats(norm, norm.reshape(1)), state)
        return result.coefficients, result.state, dict(result.telemetry)

    initial = strategy.initial_state(torch.zeros((), dtype=torch.float64))
    state = {key: value.expand(len(traces), *value.shape) for key, value in initial.items()}
    rows = []
    for norms in torch.from_numpy(np.ascontiguousarray(traces.T)):
        rows.append(torch.func.vmap(rule)(norms, state))
        state = rows[-1][1]
    coefficients, states, telemetry = zip(*rows, strict=True)
    return Lanes(torch.stack(coefficients, 1).numpy(), _stack(telemetry), _stack(states))


def _stack(rows: tuple[dict[str, torch.Tensor], ...]) -> dict[str, np.ndarray]:
    return {key: torch.stack([row[key] for row in rows], 1).numpy() for key in rows[0]}
