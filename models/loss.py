"""Cross entropy of a language model without its logits: (tokens x vocabulary) never exists whole in float32.

Some rows of logits are made at a time, and their share of the gradients is taken at once, while they are there; the
backward pass then only scales. torch's own `linear_cross_entropy` works the same way, but returns the loss of bfloat16
inputs in bfloat16, two decimal digits of it, and has no z-loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Logits made at once, by device: on a GPU their float32 copy and their logarithms of probabilities take 128 MiB each,
#: on a CPU 4 MiB, which stay in its cache; and not fewer rows than make a matrix product worth it.
ELEMENTS = {"cuda": 1 << 25, "cpu": 1 << 20}
LEAST_ROWS = 128


Slopes = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def chunk_rows(tokens: int, vocabulary: int, device: str) -> int:
    """Return of how many tokens the logits are made at once."""
    return min(tokens, max(LEAST_ROWS, ELEMENTS.get(device, ELEMENTS["cuda"]) // vocabulary))


def slopes(logits: Tensor, wanted: Tensor, tokens: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return of some rows the gradient of the mean loss by their logits, and their sums of -log p and of log Z squared.

    Args:
        logits: (rows, vocab).
        wanted: (rows, 1) ids.
        tokens: in the mean, 0-dim float32.
        z_loss: see `linear_cross_entropy`.
    """
    exact = logits.float()
    log_p = exact.log_softmax(-1)
    log_p_wanted = log_p.gather(1, wanted)
    log_z = exact.gather(1, wanted) - log_p_wanted
    # By the logits, the sum has softmax (1 + 2 z log Z), less 1 at the target.
    slope = log_p.exp_()
    if z_loss:
        slope *= 1 + 2 * z_loss * log_z
    slope.scatter_add_(1, wanted, torch.full_like(log_z, -1.0))
    return slope.div_(tokens).to(logits.dtype), -log_p_wanted.sum(), log_z.square().sum()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, between: Slopes = slopes
) -> tuple[Tensor, Tensor]:
    """Return the loss of logits `hidden @ weight.T`, and the cross entropy in it.

    Args:
        hidden: (tokens, hidden).
        weight: (vocab, hidden), used in the dtype of autocast, if it is on, else in that of `hidden`.
        targets: (tokens,) ids.
        z_loss: weight of the mean square of log Z, the logarithm of the softmax's denominator (PaLM, section 5).
        between: what is done between the matrix products: `slopes`, or that compiled.

    Returns:
        what is to be minimised, and the mean cross entropy in nats, which has no gradient; both 0-dim float32.
    """
    loss, cross_entropy = _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, between)
    return loss, cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, between: Slopes
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        x, w = hidden.to(dtype), weight.to(dtype)
        differentiate = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if differentiate else None
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if differentiate else None
        cross_entropy = torch.zeros((), dtype=torch.float32, device=x.device)
        squares = torch.zeros_like(cross_entropy)
        count = torch.full((), float(len(x)), device=x.device)
        tokens, rows = len(x), chunk_rows(len(x), len(w), device)
        with torch.autocast(device, enabled=False):
            for first in range(0, tokens, rows):
                part, wanted = x[first : first + rows], targets[first : first + rows, None]
                slope, entropy, square = between(part @ w.T, wanted, count, z_loss)
                cross_entropy += entropy
                squares += square
                if grad_x is None or grad_w is None:
                    continue
                torch.mm(slope, w, out=grad_x[first : first + rows])
                if dtype == torch.float32:
                    grad_w.addmm_(slope.T, part)
                else:
                    grad_w += slope.T @ part
        if grad_x is not None and grad_w is not None:
            ctx.save_for_backward(grad_x.to(hidden.dtype), grad_w.to(weight.dtype))
        cross_entropy /= tokens
        loss = cross_entropy + z_loss * squares / tokens
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        # In float32: in bfloat16 the factor itself, such as the third of three micro-batches, would be rounded.
        return *((grad.float() * grads[0]).to(grad.dtype) for grad in (grad_x, grad_w)), None, None, None
