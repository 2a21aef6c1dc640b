"""Skip-step: a step whose loss or norm is an outlier does not happen."""

import torch
from torch import Tensor

from zclip.base import Clipping, ClippingStrategy, Measured, State, is_number, require


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

    Raises:
        ValueError: an argument is out of its range.
    """

    uses_loss = True

    def __init__(self, sigma: float = 6.0, window: int = 128) -> None:
        require(is_number(sigma) and sigma > 0, "sigma", sigma, "a number above 0")
        require(type(window) is int and window >= 2, "window", window, "an integer from 2")
        super().__init__()
        self.sigma = sigma
        self.window = window

    def initial_state(self, like: Tensor) -> State:
        """Return empty windows."""
        return {
            "count": torch.zeros((), dtype=torch.int64, device=like.device),
            "losses": like.new_zeros(self.window),
            "norms": like.new_zeros(self.window),
        }

    def clip(self, measured: Measured, state: State) -> Clipping:
        """Return coefficients of 1, and whether to skip."""
        norm, count = measured.norm, state["count"]
        loss = torch.zeros_like(norm) if measured.loss is None else measured.loss.detach().to(norm.device, norm.dtype)
        places = torch.arange(self.window, device=norm.device)
        held = places < count
        enough = count >= max(2, self.window // 2) - 1
        bad = ~torch.isfinite(loss)
        for value, history in ((loss, state["losses"]), (norm, state["norms"])):
            n = held.sum()
            mean = torch.where(held, history, 0.0).sum() / n
            var = torch.where(held, history - mean, 0.0).square().sum() / (n - 1)
            bad = bad | (enough & (value - mean > self.sigma * var.sqrt()))
        here = places == count % self.window
        seen = torch.where(torch.isfinite(loss), loss, state["losses"].take(count % self.window))
        return Clipping(
            torch.ones_like(norm),
            clipped_norm=norm,
            clipped=bad,
            state={
                "count": count + 1,
                "losses": torch.where(here, seen, state["losses"]),
                "norms": torch.where(here, norm, state["norms"]),
            },
            telemetry={"skipped": bad},
            skip=bad,
        )
