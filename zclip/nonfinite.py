"""Norms that are NaN or infinite: which parameters are at fault, and when enough is enough."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zclip.norm import Shard

#: What may happen at such a norm; see `zclip.ClippingStrategy`.
POLICIES = ("skip", "zero", "raise")


def fault(norm: Tensor, norms: Tensor, shards: Sequence[Shard], most: int = 5) -> str:
    """Say which parameters make a norm non-finite. Waits for the device.

    Args:
        norm: 0-dim, not finite.
        norms: (n,) norms of the gradients.
        shards: the n parameters, or none if unknown.
        most: how many to name.
    """
    wrong = [i for i, ok in enumerate(torch.isfinite(norms).tolist()) if not ok]
    named = [f"number {i} of shape {tuple(shards[i].parameter.shape)}" for i in wrong[:most] if shards]
    more = f" and {len(wrong) - most} more" if len(wrong) > most else ""
    where = f"; parameters with such gradients, in the order given: {', '.join(named)}{more}" if named else ""
    return f"the gradient norm is {float(norm)}{where}"


class Watch:
    """Looks at a counter on the device without making the host wait for it.

    On a CPU the counter is read at once. On an accelerator each step starts a copy to the host, and reads the last
    copy that has arrived.
    """

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._arrived: torch.Event | None = None

    def look(self, count: Tensor, limit: int | None) -> None:
        """Raise `FloatingPointError` if the count is known to have reached the limit.

        Args:
            count: 0-dim integer tensor, norms in a row that were not finite.
            limit: `None`: never raise.
        """
        if limit is None or count.device.type == "meta":
            return
        if count.device.type == "cpu":
            seen = int(count)
        else:
            if self._arrived is not None and not self._arrived.query():
                return
            seen = int(self._copy) if self._copy is not None else 0
            if self._copy is None:
                self._copy = torch.zeros((), dtype=count.dtype, pin_memory=True)
            self._copy.copy_(count, non_blocking=True)
            self._arrived = torch.Event(count.device)
            self._arrived.record()
        if seen >= limit:
            raise FloatingPointError(
                f"the gradient norm was NaN or infinite {seen} times in a row: the run has most likely diverged. "
                "Go back to a checkpoint from before, with a lower learning rate or past the data that did it; in "
                "fp16, look at the loss scale. max_consecutive_nonfinite sets how many are borne"
            )
