"""Norms that are NaN or infinite: which parameters are at fault, and when enough is enough."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zclip.norm import Parameters, Shard

#: What may happen at such a norm; see `zclip.ClippingStrategy`.
POLICIES = ("skip", "zero", "raise")


def fault(norm: Tensor, norms: Tensor, shards: Sequence[Shard], names: Mapping[int, str], most: int = 5) -> str:
    """Say which parameters make a norm non-finite. Waits for the device.

    Args:
        norm: 0-dim, not finite.
        norms: (n,) norms of the gradients.
        shards: the n parameters, or none if unknown.
        names: of parameters, from `names_of`.
        most: how many to name.
    """
    wrong = [i for i, ok in enumerate(torch.isfinite(norms).tolist()) if not ok] if shards else []
    parameters = [(i, shards[i].parameter) for i in wrong[:most]]
    named = [f"{names.get(id(p), f'number {i} given')} of shape {tuple(p.shape)}" for i, p in parameters]
    more = f" and {len(wrong) - most} more" if len(wrong) > most else ""
    where = f"; so are the norms of the gradients of {', '.join(named)}{more}" if named else ""
    return f"the gradient norm is {float(norm)}{where}"


def names_of(models: Parameters) -> dict[int, str]:
    """Return the names of parameters in the modules among `models`, by the parameters' ids."""
    if isinstance(models, nn.Module):
        return {id(parameter): name for name, parameter in models.named_parameters()}
    if isinstance(models, Tensor):
        return {}
    return {identity: name for inner in models for identity, name in names_of(inner).items()}


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
