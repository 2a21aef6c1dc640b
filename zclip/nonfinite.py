"""Non-finite norms (NaN or infinite): which parameters cause one, and when too many are consecutive."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zclip.norm import Parameters, Shard

#: Allowed values of `on_nonfinite`; see `zclip.ClippingStrategy`.
POLICIES = ("skip", "zero", "raise")


def nonfinite_message(
    norm: Tensor, norms: Tensor, shards: Sequence[Shard], names: Mapping[int, str], max_named: int = 5
) -> str:
    """Return a sentence that names the parameters with non-finite gradients. Waits for the device.

    Args:
        norm: 0-dim, the global norm, not finite.
        norms: (n,) norm of each gradient.
        shards: the n parameters; empty if they are unknown.
        names: names of parameters by their ids, from `parameter_names`.
        max_named: maximum number of parameters to name. Default 5.
    """
    indices = [i for i, finite in enumerate(torch.isfinite(norms).tolist()) if not finite] if shards else []
    parameters = [(i, shards[i].parameter) for i in indices[:max_named]]
    named = [f"{names.get(id(p), f'parameter {i}')} of shape {tuple(p.shape)}" for i, p in parameters]
    more = f" and {len(indices) - max_named} more" if len(indices) > max_named else ""
    where = f"; so are the norms of the gradients of {', '.join(named)}{more}" if named else ""
    return f"the gradient norm is {float(norm)}{where}"


def parameter_names(models: Parameters) -> dict[int, str]:
    """Return the names of the parameters of the modules among `models`, by the parameters' ids."""
    if isinstance(models, nn.Module):
        return {id(parameter): name for name, parameter in models.named_parameters()}
    if isinstance(models, Tensor):
        return {}
    return {identity: name for inner in models for identity, name in parameter_names(inner).items()}


class NonFiniteMonitor:
    """Checks a counter of consecutive non-finite norms against a limit, without a device sync.

    On a CPU the counter is read at once. On an accelerator each step starts an asynchronous copy to the host and reads
    the last copy that has arrived.
    """

    def __init__(self) -> None:
        self._host_count: Tensor | None = None
        self._arrived: torch.Event | None = None

    def update(self, count: Tensor, limit: int | None) -> None:
        """Check the newest value that the host knows.

        Args:
            count: 0-dim integer tensor, number of consecutive non-finite norms.
            limit: number that raises; `None`: never raise.

        Raises:
            FloatingPointError: the count has reached the limit.
        """
        if limit is None or count.device.type == "meta":
            return
        if count.device.type == "cpu":
            known = int(count)
        else:
            if self._arrived is not None and not self._arrived.query():
                return
            known = int(self._host_count) if self._host_count is not None else 0
            if self._host_count is None:
                self._host_count = torch.zeros((), dtype=count.dtype, pin_memory=True)
            self._host_count.copy_(count, non_blocking=True)
            self._arrived = torch.Event(count.device)
            self._arrived.record()
        if known >= limit:
            raise FloatingPointError(
                f"the gradient norm was NaN or infinite {known} times in a row: the run has most likely diverged. "
                "Restart from an earlier checkpoint with a lower learning rate, or skip the data that caused it; in "
                "fp16, check the loss scale. max_consecutive_nonfinite sets how many are tolerated"
            )
