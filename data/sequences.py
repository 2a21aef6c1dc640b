"""Fixed-length sequences of a token array, and their order.

Sequence i is tokens [i L, (i + 1) L] inclusive: L inputs and the L targets one place later. TokenDataset
share one token at their border, so every token but the first is predicted exactly once; a tail shorter than
L is left out. Position p of a run is sequence perm(p mod n) of epoch p div n, perm being a permutation keyed by
seed and epoch and computed element by element: nothing is stored, and any position can be asked for.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.tokens import TokenArray

AHEAD = 4096
_ROUNDS = 6
_MASK = (1 << 64) - 1


class TokenDataset:
    """Random access to the sequences of a token array.

    Args:
        tokens: ids of documents one after another.
        length: L, inputs per sequence.
    """

    def __init__(self, tokens: TokenArray, length: int) -> None:
        self.tokens = tokens
        self.length = length
        self.count = (len(tokens) - 1) // length

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the sequences of these indices: (len(indices), L + 1) ids, uint16 or uint32 as they are stored.

        A model wants `.long()` of them: on the device, after four times fewer bytes have travelled there.
        """
        return torch.from_numpy(self.tokens.rows(indices * self.length, self.length + 1))

    def documents(self, indices: np.ndarray) -> Tensor:
        """Return of which document each input is: (len(indices), L) int32, from 0 within each sequence.

        What a model needs to reset attention and positions at the borders of documents.
        """
        return torch.from_numpy(self.tokens.documents(indices * self.length, self.length))


class ShuffledDataset:
    """TokenDataset in the order of a run.

    Args:
        sequences: what to read from.
        seed: of the order.
    """

    def __init__(self, sequences: TokenDataset, seed: int) -> None:
        self.sequences = sequences
        self.order = Order(len(sequences), seed)

    def __len__(self) -> int:
        """TokenDataset in an epoch."""
        return len(self.sequences)

    def take(self, first: int, rows: int, documents: bool = False) -> Batch:
        """Return the sequences at positions first to first + rows - 1 of the run.

        Args:
            first: sequences of the run before.
            rows: how many.
            documents: whether to say of which document each input is.
        """
        indices = self.order(first, rows)
        return Batch(self.sequences.batch(indices), documents=self.sequences.documents(indices) if documents else None)

    def state(self) -> dict[str, Any]:
        """Return what a position needs besides its number: nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Do nothing: any position can be asked for."""

    def close(self) -> None:
        """Do nothing: nothing is read ahead."""


class Order:
    """`order`, computed some thousand positions at a time: a call for a batch of a few costs as much.

    Args:
        count: sequences in one epoch.
        seed: of the run.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._first = 0
        self._known = np.empty(0, np.int64)

    def __call__(self, first: int, rows: int) -> np.ndarray:
        """Return which sequences stand at positions first to first + rows - 1: (rows,) int64."""
        if first < self._first or first + rows > self._first + len(self._known):
            self._first = first
            ahead = min(AHEAD, self.count - first % self.count)  # no further than the epoch's end
            self._known = order(np.arange(first, first + max(rows, ahead)), self.count, self.seed)
        return self._known[first - self._first :][:rows]


def order(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return which sequence stands at each position.

    Args:
        positions: (n,) non-negative integers, the numbers of sequences consumed before each.
        count: sequences in one epoch.
        seed: of the run.

    Returns:
        (n,) int64 in [0, count); any `count` consecutive positions of one epoch are all different.
    """
    positions = np.asarray(positions, dtype=np.int64)
    indices = np.empty_like(positions)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        indices[here] = _permute(positions[here] % count, count, seed, int(epoch))
    return indices


def _permute(values: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Keyed permutation of [0, count): a Feistel network on the next even power of two, walked back into range."""
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
    """Return the entropy of the tokens' own frequencies, in nats per token.

    No model that ignores context has a lower loss on these tokens, not even one fitted to them.

    Args:
        tokens: (tokens,) ids.
    """
    counts = np.bincount(tokens).astype(np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
