"""What the time of a step goes to, taken on the device without waiting for it."""

import time
from collections.abc import Sequence
from typing import Any

import torch

#: Parts of a step: waiting for the batch and moving it to the device; the passes; the clipper; the optimizer.
PARTS = ("data", "forward_backward", "clip", "optimizer")

#: What is told of a step: its parts, and how long it had to wait for a checkpoint and an evaluation before it.
TOLD = (*PARTS, "saving", "evaluation")

Spans = Sequence[tuple[str, Any, Any]]


class StepTimer:
    """Cuts time into parts, each from the mark before it to its own.

    A mark on a GPU is an event in the current stream: it tells when the GPU came there, not when Python did.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = self._now()
        self._spans: list[tuple[str, Any, Any]] = []

    def mark(self, part: str) -> None:
        """Say what the time since the last mark was for: one of `PARTS`, or anything else."""
        now = self._now()
        self._spans.append((part, self._last, now))
        self._last = now

    def lap(self) -> Spans:
        """Return what was marked since the last call, for `seconds`."""
        spans, self._spans = self._spans, []
        return spans

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(spans: Spans) -> dict[str, float]:
    """Return the seconds of each of `TOLD`. On a GPU the last mark must have been reached."""
    sums = dict.fromkeys(TOLD, 0.0)
    for part, start, end in spans:
        if part in sums:
            sums[part] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return sums
