"""How long each phase of a step takes, measured on the device without a synchronisation."""

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

#: Phases of a step: waiting for the batch and its copy to the device; forward and backward; clipping; the optimizer.
StepPhase = Literal["data", "forward_backward", "clip", "optimizer"]

#: Phases whose time is recorded: those of the step, and the waits for a checkpoint and for an evaluation before it.
TimedPhase = Literal[StepPhase, "saving", "evaluation"]

STEP_PHASES, TIMED_PHASES = get_args(StepPhase), get_args(TimedPhase)

#: Phases with the times at which each began and ended.
Timings = Sequence[tuple[str, Any, Any]]


class StepTimer:
    """Divides time into phases, each from the end of the phase before it.

    On a GPU the times are events in the current stream: they measure when the GPU got there, not when Python did.
    """

    def __init__(self, device: torch.device) -> None:
        self.restart(device)

    def restart(self, device: torch.device) -> None:
        """Begin the first phase now, on this device, and drop what was recorded."""
        self.device = device
        self._last = self._now()
        self._timings: list[tuple[str, Any, Any]] = []

    def record(self, phase: TimedPhase | Literal["flush"]) -> None:
        """End a phase."""
        now = self._now()
        self._timings.append((phase, self._last, now))
        self._last = now

    def pop(self) -> Timings:
        """Return the phases since the last call, as `seconds` takes them."""
        timings, self._timings = self._timings, []
        return timings

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(timings: Timings) -> dict[str, float]:
    """Return the seconds of each of `TIMED_PHASES`. A GPU must have reached the last event."""
    sums = dict.fromkeys(TIMED_PHASES, 0.0)
    for phase, start, end in timings:
        if phase in sums:
            sums[phase] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return sums
