"""Norms of gradients on a CPU, with relative errors below 1e-6.

torch adds the squares of a tensor one after another in the lanes of a vector register, which errs by 1 % at 134 million
elements of float32. So it depends on the size how a tensor is measured. Up to `ROW` elements are added in float32 and
up to `SMALL` in float64, by one foreach call for all such tensors. Larger tensors are added in rows of `ROW` elements
in float32, and the rows in float64. Squares of float64 elements are always added in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Elements that are added in float32.
ROW = 512
#: Elements up to which float64 is faster than rows.
SMALL = 1 << 14
#: Elements of half precision that are converted at a time: they stay in a core's cache.
CHUNK = 1 << 18
#: Below this norm, squares that matter may vanish in float32.
TINY = 1e-15
#: Above this norm, squares overflow in float32.
LARGEST = torch.finfo(torch.float32).max ** 0.5


def cpu_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each of n floating tensors, (n,) float64; infinity above `LARGEST` unless it is float64."""
    norms = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    wide = torch.float64
    _measure(norms, tensors, [i for i, t in enumerate(tensors) if t.numel() <= ROW and t.dtype != wide], torch.float32)
    rest = (norms < TINY).nonzero().flatten().tolist()
    _measure(norms, tensors, [i for i in rest if tensors[i].numel() <= SMALL or tensors[i].dtype == wide], wide)
    large = [i for i in rest if tensors[i].numel() > SMALL and tensors[i].dtype != wide]
    if large:
        rows = [_row_norms(_flat(tensors[i])) for i in large]
        norms[large] = torch.stack(torch._foreach_norm(rows, 2, dtype=wide))
    for i in (norms < TINY).nonzero().flatten().tolist():
        if tensors[i].numel() > SMALL and tensors[i].dtype != wide:
            norms[i] = _tiny_norm(_flat(tensors[i]))
    for i in (norms > LARGEST).nonzero().flatten().tolist():
        if tensors[i].dtype != wide:
            norms[i] = torch.inf
    return norms


def _measure(norms: Tensor, tensors: Sequence[Tensor], indices: list[int], dtype: torch.dtype) -> None:
    """Set the norms of some of the tensors, with squares of this dtype."""
    if indices:
        measured = torch.stack(torch._foreach_norm([tensors[i] for i in indices], 2, dtype=dtype))
        norms[indices] = measured.to(norms.dtype)


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor, (n,), in the order of the memory; a view unless they overlap or lie apart."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=strides.__getitem__, reverse=True)
    return tensor.detach().permute(order).reshape(-1)


def _row_norms(flat: Tensor) -> Tensor:
    """Return the norms of rows of `ROW` elements, the last one shorter."""
    norms = []
    for chunk in [flat] if flat.dtype == torch.float32 else flat.split(CHUNK):
        chunk = chunk.float()
        whole = len(chunk) - len(chunk) % ROW
        norms.append(torch.linalg.vector_norm(chunk[:whole].view(-1, ROW), dim=1))
        if whole < len(chunk):
            norms.append(torch.linalg.vector_norm(chunk[whole:]).reshape(1))
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _tiny_norm(flat: Tensor) -> Tensor:
    """Return the 2-norm of elements whose squares may vanish in float32, 0-dim float64."""
    largest = torch.linalg.vector_norm(flat, torch.inf, dtype=torch.float32)
    scale = torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(_row_norms(flat.float() / scale), dtype=torch.float64) * scale
