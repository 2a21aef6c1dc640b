"""Cross entropy of a language model without the full logits.

The forward pass computes logits chunk by chunk, and with each chunk its part of the gradients; the backward pass only
scales them. torch's own `linear_cross_entropy` returns the loss of bfloat16 inputs in bfloat16, and has no z-loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Logits in a chunk, by device. On a GPU the float32 logits and their log-probabilities take 128 MiB each; on a CPU
#: they take 4 MiB and stay in its cache.
MAX_LOGITS = {"cuda": 1 << 25, "cpu": 1 << 20}

#: Minimum number of rows in a chunk: with fewer, matrix products are slow.
MIN_ROWS = 128

#: `logit_grads`, or a compiled version of it.
ChunkFn = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def chunk_rows(tokens: int, vocabulary: int, device: str) -> int:
    """Return the number of tokens in a chunk of logits."""
    return min(tokens, max(MIN_ROWS, MAX_LOGITS.get(device, MAX_LOGITS["cuda"]) // vocabulary))


def logit_grads(
    logits: Tensor, targets: Tensor, num_tokens: Tensor, z_loss: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the mean loss with respect to a chunk of logits, and the chunk's part of the loss.

    Args:
        logits: (rows, vocab).
        targets: (rows, 1) ids.
        num_tokens: tokens in the mean, 0-dim float32.
        z_loss: see `linear_cross_entropy`.
        mask: (rows, 1) bool, false where a token has no loss; `None`: all have.

    Returns:
        (rows, vocab) gradient in the dtype of the logits; the sums over rows of -log p and of (log Z)^2.
    """
    logits_fp32 = logits.float()
    log_probs = logits_fp32.log_softmax(-1)
    target_log_probs = log_probs.gather(1, targets)
    log_z = logits_fp32.gather(1, targets) - target_log_probs
    # The gradient of the summed loss is softmax (1 + 2 z log Z), minus 1 at the target.
    grad = log_probs.exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * log_z
    grad.scatter_add_(1, targets, torch.full_like(log_z, -1.0))
    if mask is not None:
        grad, target_log_probs, log_z = (values.masked_fill(~mask, 0.0) for values in (grad, target_log_probs, log_z))
    return grad.div_(num_tokens).to(logits.dtype), -target_log_probs.sum(), log_z.square().sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    chunk_fn: ChunkFn = logit_grads,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of logits `hidden @ weight.T`, and the cross entropy in it.

    Args:
        hidden: (tokens, hidden).
        weight: (vocab, hidden). It is used in autocast's dtype if autocast is on, otherwise in the dtype of `hidden`.
        targets: (tokens,) ids.
        z_loss: weight of the mean square of log Z, the logarithm of the softmax's denominator (PaLM, section 5).
        chunk_fn: computes what is between the matrix products: `logit_grads`, or a compiled version of it.
        mask: (tokens,) bool. Tokens where it is false count as tokens without any loss. Default `None`: all have one.

    Returns:
        The loss to minimise, and the mean cross entropy in nats without gradient; both 0-dim float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, chunk_fn, mask)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk_fn: ChunkFn,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        x, w = hidden.to(dtype), weight.to(dtype)
        differentiate = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if differentiate else None
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if differentiate else None
        cross_entropy = torch.zeros((), dtype=torch.float32, device=x.device)
        log_z_squared = torch.zeros_like(cross_entropy)
        num_tokens = torch.full((), float(len(x)), device=x.device)
        tokens, rows = len(x), chunk_rows(len(x), len(w), device)
        with torch.autocast(device, enabled=False):
            for start in range(0, tokens, rows):
                chunk, chunk_targets = x[start : start + rows], targets[start : start + rows, None]
                chunk_mask = None if mask is None else mask[start : start + rows, None]
                numbers = chunk_fn(chunk @ w.T, chunk_targets, num_tokens, z_loss, chunk_mask)
                grad, chunk_entropy, chunk_squares = numbers
                cross_entropy += chunk_entropy
                log_z_squared += chunk_squares
                if grad_x is None or grad_w is None:
                    continue
                torch.mm(grad, w, out=grad_x[start : start + rows])
                if dtype == torch.float32:
                    grad_w.addmm_(grad.T, chunk)
                else:
                    grad_w += grad.T @ chunk
        if grad_x is not None and grad_w is not None:
            ctx.save_for_backward(grad_x.to(hidden.dtype), grad_w.to(weight.dtype))
        cross_entropy /= tokens
        loss = cross_entropy + z_loss * log_z_squared / tokens
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        return _scaled(grad_x, grads[0]), _scaled(grad_w, grads[0]), None, None, None, None


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return a product computed in float32: bfloat16 would round the factor, such as 1/3 with three micro-batches."""
    return grad * factor if grad.dtype == torch.float32 else grad.float().mul_(factor).to(grad.dtype)
