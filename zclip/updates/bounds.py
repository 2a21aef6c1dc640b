"""Upper bounds on the next of a series of numbers, from a ring of the last ones."""

import torch
from torch import Tensor

#: Numbers that a bound over recent ones needs, and one over those of long before.
MIN_RECENT, MIN_PAST = 16, 256
#: Lower bound on the robust standard deviation of log norms.
MIN_SIGMA = 0.05


def robust_bound(
    history: Tensor, count: Tensor, *, sigmas: float, window: int, past_sigmas: float, lag: int, past_window: int
) -> Tensor:
    """Return the lower of two robust bounds: over recent numbers, and over those of long before.

    Each is the median plus some robust standard deviations: 1.4826 times the median absolute deviation, at least 0.05.
    The recent numbers follow a slow rise, and those of long before do not. The latter are the older half at first.

    Args:
        history: (lag + past_window,) ring of numbers, the i-th of them at index i modulo its length; infinity behind.
        count: 0-dim int64, how many numbers have been added.
        sigmas: deviations above the median of the last `window` numbers, once there are 16.
        window: number of recent numbers.
        past_sigmas: deviations above the median of the `past_window` numbers before the last `lag`, once there are 256.
        lag: number of latest numbers that are left out there.
        past_window: number of numbers there.

    Returns:
        0-dim; infinity while there are too few numbers.
    """
    slots = torch.arange(history.numel(), device=history.device)
    age = (count - 1 - slots) % history.numel() + 1  # 1 for the last number
    known = age <= count
    recent = _bound(history, known & (age <= window), sigmas)
    past = _bound(history, known & (age > (count - count // 2).clamp(max=lag)), past_sigmas)
    infinite = torch.full_like(recent, torch.inf)
    recent = torch.where(count >= MIN_RECENT, recent, infinite)
    return torch.minimum(recent, torch.where(count >= MIN_PAST, past, infinite))


def _bound(values: Tensor, chosen: Tensor, sigmas: float) -> Tensor:
    centre = _median(values, chosen)
    deviation = _median((values - centre).abs(), chosen)
    return centre + sigmas * (1.4826 * deviation).clamp(min=MIN_SIGMA)


def _median(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the median of the chosen values, the lower one of two; infinity if there are none."""
    ordered = torch.where(chosen, values, torch.inf).sort().values
    return ordered.take((chosen.sum() - 1).clamp(min=0) // 2)
