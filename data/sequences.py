"""Fixed-length sequences of a token array, and their order.

Sequence i is tokens [i L, (i + 1) L] inclusive: L inputs and the L targets one position later. Neighbouring sequences
share one token, so every token but the first is predicted exactly once; a remainder shorter than L is dropped. Position
p of a run is sequence perm(p mod n) of epoch p div n. The permutation is keyed by seed and epoch, and is computed
element by element: nothing is stored, and any position can be computed directly.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.tokens import TokenArray

#: Positions that `Order` computes at once.
ORDER_BLOCK = 4096
_ROUNDS = 6
_MASK = (1 << 64) - 1


class Batch(NamedTuple):
    """Sequences to train on: (rows, length + 1) token ids of any integer type.

    The inputs are all but the last. The targets, (rows, length), are all but the first if they are `None`. Rows where
    the instance mask, (rows,) bool, is false do not contribute to the loss; all do if it is `None`. `masked_rows` is
    the number of such rows in the global batch. If they are all of it, there is no mask, and the step is to be skipped.
    """

    tokens: Tensor
    targets: Tensor | None = None
    instance_mask: Tensor | None = None
    masked_rows: int = 0


class TokenDataset:
    """Random access to the sequences of a token array, each of `length` inputs."""

    def __init__(self, tokens: TokenArray, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the sequences with these indices: (len(indices), L + 1) ids, uint16 or uint32 as they are stored."""
        return torch.from_numpy(self.tokens.rows(indices * self.length, self.length + 1))


class ShuffledDataset:
    """The sequences of a dataset in the order of a run, which the seed determines."""

    def __init__(self, sequences: TokenDataset, seed: int) -> None:
        self.sequences = sequences
        self.order = Order(len(sequences), seed)

    def __len__(self) -> int:
        """Number of sequences in an epoch."""
        return len(self.sequences)

    def take(self, first: int, rows: int) -> Tensor:
        """Return the sequences at positions first to first + rows - 1 of the run: (rows, L + 1) ids."""
        return self.sequences.batch(self.order(first, rows))

    def state(self) -> dict[str, Any]:
        """Return nothing: a position needs only its number."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Do nothing: any position can be computed directly."""

    def close(self) -> None:
        """Do nothing: no thread reads ahead."""


class Order:
    """`order` with a cache: it computes thousands of positions at once, because a few cost as much."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._first = 0
        self._cached = np.empty(0, np.int64)

    def __call__(self, first: int, rows: int) -> np.ndarray:
        """Return the indices of the sequences at positions first to first + rows - 1: (rows,) int64."""
        if first < self._first or first + rows > self._first + len(self._cached):
            self._first = first
            to_compute = min(ORDER_BLOCK, self.count - first % self.count)  # at most up to the end of the epoch
            self._cached = order(np.arange(first, first + max(rows, to_compute)), self.count, self.seed)
        return self._cached[first - self._first :][:rows]


def order(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the index of the sequence at each position: (n,) int64 in [0, count), each once per epoch."""
    indices = np.empty_like(positions)
    for epoch in np.unique(positions // count):
        in_epoch = positions // count == epoch
        indices[in_epoch] = _permute(positions[in_epoch] % count, count, seed, int(epoch))
    return indices


def _permute(values: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Keyed permutation of [0, count): a Feistel network on the next even power of two, with cycle walking."""
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = [_mix((seed & _MASK) * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + r) for r in range(_ROUNDS)]
    out = values.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, keys)
        outside = out >= count
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        mixed = (right + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9) ^ np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
    return left << shift | right


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Return the entropy of the tokens' frequencies in nats per token: the lowest loss that needs no context."""
    counts = np.bincount(tokens).astype(np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
