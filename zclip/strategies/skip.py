"""Skip-step: a step whose loss or norm is an outlier does not happen."""

from typing import Unpack

import torch
from torch import Tensor

from zclip.base import Clipping, ClippingStrategy, Measured, Policy, State, is_count, is_number, require


class SkipStep(ClippingStrategy):
    """Skip the optimizer step when the loss or the norm is an outlier in a rolling window.

    As `SkipStepAdamW` of OLMo-core (the trainer of OLMo 2, arXiv 2501.00656): a step is skipped unless

        loss - mean(losses) <= sigma std(losses)   and   norm - mean(norms) <= sigma std(norms)

    over the values of the last `window` steps before this one, with the unbiased standard deviation. Skipped steps
    enter the window like any others. Nothing is skipped until max(2, window / 2) - 1 steps have been seen, except at a
    loss that is not finite. Give the loss to `step`, or only the norm is looked at; and the optimizer, or a
    skipped step has zero gradients instead (see `ClippingStrategy`).

    Args:
        sigma: standard deviations above the mean that make an outlier. Default 6.
        window: values that count. Default 128.
        policy: `on_nonfinite` and `max_consecutive_nonfinite`, see `ClippingStrategy`.

    Raises:
        ValueError: an argument is out of its range.

    Telemetry, besides that of every strategy: `skipped`, 0 or 1.
    """

    uses_loss = True

    def __init__(self, sigma: float = 6.0, window: int = 128, **policy: Unpack[Policy]) -> None:
        require(is_number(sigma) and sigma > 0, "sigma", sigma, "a number above 0")
        require(is_count(window, 2), "window", window, "an integer from 2")
        super().__init__(None, **policy)
        self.sigma = sigma
        self.window = window

    def initial_state(self, like: Tensor) -> State:
        """Return empty windows."""
        zero = torch.zeros((), dtype=torch.int64, device=like.device)
        windows = {"losses": like.new_zeros(self.window), "norms": like.new_zeros(self.window)}
        return {"loss_count": zero, "norm_count": zero.clone(), **windows}

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Return coefficients of 1, and whether to skip."""
        norm = measured.norm
        bad, norms, norm_count = self._outlier(norm, state["norms"], state["norm_count"])
        new = {"norms": norms, "norm_count": norm_count}
        if measured.loss is not None:
            loss = measured.loss.detach().to(norm.device, norm.dtype)
            outlier, losses, loss_count = self._outlier(loss, state["losses"], state["loss_count"])
            bad = bad | outlier
            new |= {"losses": losses, "loss_count": loss_count}
        return Clipping(torch.ones_like(norm), norm, bad, new, {"skipped": bad}, skip=bad)

    def _outlier(self, value: Tensor, window: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether a value is an outlier, and window and count with it; one not finite is, and stays out."""
        finite = torch.isfinite(value)
        places = torch.arange(self.window, device=value.device)
        held = places < count
        n = held.sum()
        mean = torch.where(held, window, 0.0).sum() / n
        std = (torch.where(held, window - mean, 0.0).square().sum() / (n - 1)).sqrt()
        enough = count >= max(2, self.window // 2) - 1
        bad = ~finite | (enough & (value - mean > self.sigma * std))
        entered = torch.where(finite & (places == count % self.window), value, window)
        return bad, entered, count + finite
