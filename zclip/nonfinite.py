"""Non-finite norms (NaN or infinite): which parameters cause one, and when too many are consecutive."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zclip.arguments import integer, one_of
from zclip.decision import GradStats
from zclip.host_count import HostCount

#: Allowed values of `on_nonfinite`; see `zclip.ClippingStrategy`.
POLICIES = ("skip", "zero", "raise")
#: Checks of what a strategy does with such norms, by attribute: each returns the value, or raises `ArgumentError`.
POLICY_CHECKS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "on_nonfinite": lambda value: one_of("on_nonfinite", value, POLICIES),
        "max_consecutive_nonfinite": lambda value: integer("max_consecutive_nonfinite", value, null="for no limit"),
    }
)
#: Maximum number of parameters that a message names.
MAX_NAMED = 5


def nonfinite_message(stats: GradStats, names: Mapping[int, str]) -> str:
    """Return a sentence that names the first parameters with non-finite gradients. Waits for the device.

    Args:
        stats: of a step whose norm is not finite.
        names: names of parameters by their ids; others have none.
    """
    indices = [i for i, finite in enumerate(torch.isfinite(stats.norms).tolist()) if not finite and stats.shards]
    named = []
    for i in indices[:MAX_NAMED]:
        parameter = stats.shards[i].parameter
        named.append(f"{names.get(id(parameter), f'parameter {i}')} of shape {tuple(parameter.shape)}")
    more = f" and {len(indices) - MAX_NAMED} more" if len(indices) > MAX_NAMED else ""
    where = f"; so are the norms of the gradients of {', '.join(named)}{more}" if named else ""
    return f"the gradient norm is {float(stats.norm)}{where}"


class NonFiniteMonitor:
    """Checks a counter of consecutive non-finite norms against a limit, without a device sync.

    On a CPU the counter is read at once, on an accelerator a step or two late: see `HostCount`.
    """

    def __init__(self) -> None:
        self._count = HostCount()

    def update(self, count: Tensor, limit: int | None) -> None:
        """Raise `FloatingPointError` if the newest count that the host knows has reached the limit."""
        if limit is None:
            return
        known = self._count.read(count) or 0
        if known >= limit:
            raise FloatingPointError(
                f"the gradient norm was NaN or infinite {known} times in a row: the run has most likely diverged. "
                "Restart from an earlier checkpoint with a lower learning rate, or skip the data that caused it; in "
                "fp16, check the loss scale. max_consecutive_nonfinite sets how many are tolerated"
            )
