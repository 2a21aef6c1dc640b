"""Traces of gradient norms."""

import math
import random


def spiky_norms(seed: int, steps: int) -> list[float]:
    """A drifting level with 10 % noise, and one step in fifty up to 20 times as large."""
    draw = random.Random(seed)
    level, trace = 1.0, []
    for _ in range(steps):
        level *= math.exp(draw.gauss(0, 0.01))
        spike = draw.uniform(2, 20) if draw.random() < 0.02 else 1.0
        trace.append(level * math.exp(draw.gauss(0, 0.1)) * spike)
    return trace
