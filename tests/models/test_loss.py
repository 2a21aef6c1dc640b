"""The chunked loss and its gradients equal those of the plain loss."""

import pytest
import torch
from torch.nn import functional as F

import models.loss
from models.loss import chunk_rows, linear_cross_entropy, logit_grads
from tests.helpers import SLOW

TOKENS, HIDDEN, VOCABULARY = 300, 32, 500


def plain(hidden, weight, targets, z_loss=0.0):
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets) + z_loss * logits.logsumexp(-1).square().mean()


def loss_and_grads(function, dtype, autocast=False):
    """Loss and gradients of a function of the same inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = function(hidden, weight, targets)
    (loss / 3).backward()  # as one of three micro-batches
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 7, 100, 300, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_equal_the_plain_loss(rows, z_loss, monkeypatch):
    monkeypatch.setattr(models.loss, "chunk_rows", lambda *_: rows)
    expected = loss_and_grads(lambda *args: plain(*args, z_loss), torch.float32)
    actual = loss_and_grads(lambda *args: linear_cross_entropy(*args, z_loss)[0], torch.float32)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z_loss", [1e-2, SLOW(0.0)])
def test_compiled_loss_is_the_same(z_loss, monkeypatch):
    monkeypatch.setattr(models.loss, "chunk_rows", lambda *_: 100)
    expected = loss_and_grads(lambda *args: linear_cross_entropy(*args, z_loss)[0], torch.float32)
    chunk_fn = torch.compile(logit_grads, dynamic=False)
    actual = loss_and_grads(lambda *args: linear_cross_entropy(*args, z_loss, chunk_fn)[0], torch.float32)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_error_is_at_most_that_of_the_plain_loss(autocast, monkeypatch):
    monkeypatch.setattr(models.loss, "chunk_rows", lambda *_: 50)
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = loss_and_grads(plain, torch.float32)
    reference = loss_and_grads(plain, dtype, autocast)
    ours = loss_and_grads(lambda *args: linear_cross_entropy(*args)[0], dtype, autocast)
    for a, b, c in zip(ours, reference, exact, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-6 * c.norm()


def test_scaled_loss_has_scaled_gradients_in_bfloat16():
    """The factor is not rounded to bfloat16, which would make every gradient below the head 0.2 % too large."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    weight, targets = torch.randn(VOCABULARY, HIDDEN).bfloat16(), torch.randint(VOCABULARY, (TOKENS,))
    grads = [
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0] / part, hidden)[0].float()
        for part in (1, 3)
    ]
    assert abs(3 * grads[1].norm() / grads[0].norm() - 1) < 5e-4


def test_chunk_rows_by_device_and_vocabulary():
    assert chunk_rows(2048, 4096, "cpu") == 256 and chunk_rows(100, 4096, "cpu") == 100
    assert chunk_rows(2048, 65536, "cpu") == 128 and chunk_rows(16384, 65536, "cuda") == 512


def test_cross_entropy_is_returned_without_the_z_loss():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4)
    targets = torch.randint(11, (9,))
    loss, cross_entropy = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    assert not cross_entropy.requires_grad and loss > cross_entropy
    torch.testing.assert_close(cross_entropy, F.cross_entropy(hidden @ weight.T, targets).detach())
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, z_loss=0.1)[0], loss)


def test_full_logits_are_never_materialized(monkeypatch):
    """No tensor of the forward and backward pass is as large as the logits."""
    monkeypatch.setattr(models.loss, "chunk_rows", lambda *_: 10)
    largest = 0

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with LargestTensor():
        loss_and_grads(lambda *args: linear_cross_entropy(*args)[0], torch.float32)
    assert largest == VOCABULARY * HIDDEN
    largest = 0
    with LargestTensor():
        loss_and_grads(plain, torch.float32)
    assert largest == TOKENS * VOCABULARY


@pytest.mark.parametrize("z_loss", [0.0, SLOW(1e-2)])
@pytest.mark.parametrize("kept", [0, 1, 137, 300])
def test_masked_tokens_have_no_loss_and_no_gradient(kept, z_loss, monkeypatch):
    """The loss is that of the other tokens alone, times their share. The oracle never sees the masked ones."""
    monkeypatch.setattr(models.loss, "chunk_rows", lambda *_: 70)
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[:kept]] = True

    def of_the_others(hidden, weight, targets):
        if not kept:
            return hidden.sum() * 0 + weight.sum() * 0
        return plain(hidden[mask], weight, targets[mask], z_loss) * (kept / TOKENS)

    expected = loss_and_grads(of_the_others, torch.float32)
    actual = loss_and_grads(lambda *args: linear_cross_entropy(*args, z_loss, mask=mask)[0], torch.float32)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not actual[1][~mask].any()


def test_masked_tokens_do_not_spread_what_is_not_finite():
    """Logits that overflow in a masked sequence do not reach the head's gradient."""
    hidden = torch.randn(4, 3).requires_grad_()
    weight = torch.randn(5, 3).requires_grad_()
    scale = torch.tensor([[1.0], [1e38], [1.0], [1.0]])
    mask = torch.tensor([True, False, True, True])
    loss, cross_entropy = linear_cross_entropy(hidden * scale, weight * 1e3, torch.arange(4), 1e-2, mask=mask)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cross_entropy) and torch.isfinite(weight.grad).all()
