"""SkipStep: the optimizer skips a step whose loss or norm is an outlier."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.arguments import integer, positive
from zclip.base import ClippingStrategy, Policy
from zclip.decision import ClipResult, GradStats, State


class SkipStep(ClippingStrategy):
    """Skip the optimizer step if the loss or the norm is an outlier in a rolling window.

    The rule is that of `SkipStepAdamW` in OLMo-core (the trainer of OLMo 2, arXiv 2501.00656). A step is
    skipped unless::

        loss - mean(losses) <= sigma std(losses)   and   norm - mean(norms) <= sigma std(norms)

    Means and standard deviations (unbiased) are those of the last `window` steps before this one. Values of skipped
    steps enter the window too; non-finite ones do not. No step is skipped before max(2, window / 2) - 1 values are in
    the window, except for a non-finite loss. Pass the loss to `step`, otherwise only the norm counts. Pass the
    optimizer too, otherwise a skipped step has zero gradients (see `ClippingStrategy`).

    Args:
        sigma: number of standard deviations above the mean beyond which a value is an outlier, > 0. Default 6.
        window: number of values in the window, >= 2. Default 128.
        policy: `on_nonfinite`, `max_consecutive_nonfinite` and `scope`, see `ClippingStrategy`.

    Telemetry, in addition to that of `ClippingStrategy`: `skipped`, 0 or 1.
    """

    uses_loss = True
    nonnegative = ("loss_count", "norm_count", "norms")

    def __init__(self, sigma: float = 6.0, window: int = 128, **policy: Unpack[Policy]) -> None:
        super().__init__(None, **policy)
        self.sigma = positive("sigma", sigma)
        self.window = integer("window", window, minimum=2)

    def initial_state(self, like: Tensor) -> State:
        """Return empty windows."""
        zero = torch.zeros((), dtype=torch.int64, device=like.device)
        windows = {"losses": like.new_zeros(self.window), "norms": like.new_zeros(self.window)}
        return {"loss_count": zero, "norm_count": zero.clone(), **windows}

    def clip(self, stats: GradStats, state: State) -> ClipResult:
        """Return a coefficient of 1, and whether to skip the step."""
        norm = stats.norm
        skip, norms, norm_count = self._outlier(norm, state["norms"], state["norm_count"])
        new = {"norms": norms, "norm_count": norm_count}
        if stats.loss is not None:
            loss = stats.loss.detach().to(norm.device, norm.dtype)
            loss_skip, losses, loss_count = self._outlier(loss, state["losses"], state["loss_count"])
            skip = skip | loss_skip
            new |= {"losses": losses, "loss_count": loss_count}
        return ClipResult(torch.ones_like(norm), norm, skip, new, {"skipped": skip}, skip=skip)

    def _outlier(self, value: Tensor, window: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether a value is an outlier or non-finite, and window and count after adding it if it is finite."""
        finite = torch.isfinite(value)
        indices = torch.arange(self.window, device=value.device)
        filled = indices < count
        n = filled.sum()
        mean = torch.where(filled, window, 0.0).sum() / n
        std = (torch.where(filled, window - mean, 0.0).square().sum() / (n - 1)).sqrt()
        enough = count >= max(2, self.window // 2) - 1
        outlier = ~finite | (enough & (value - mean > self.sigma * std))
        new_window = torch.where(finite & (indices == count % self.window), value, window)
        return outlier, new_window, count + finite
