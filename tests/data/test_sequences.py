"""The sequences of a token array, and their order."""

import math

import numpy as np
import pytest
import torch

from data import TokenArray, TokenDataset, unigram_entropy
from data.sequences import Order, order
from tests.data.arrays import token_array


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_different_permutation(count):
    epochs = [order(np.arange(e * count, (e + 1) * count), count, seed=3) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert not np.array_equal(epochs[0], order(np.arange(count), count, seed=4))


def test_any_position_can_be_computed_alone():
    reference = order(np.arange(500), 101, seed=7)
    assert [int(order(np.array([p]), 101, seed=7)[0]) for p in range(500)] == reference.tolist()


def test_order_never_changes():
    """Runs that began with an earlier version continue with the sequences that they have not seen."""
    assert order(np.arange(96, 106), 101, seed=7).tolist() == [86, 87, 83, 37, 56, 4, 81, 9, 17, 39]


def test_order_is_statistically_random():
    """Displacements and neighbours look like those of a random permutation."""
    n = 20_000
    permuted = order(np.arange(n), n, seed=0).astype(float)
    assert abs(np.corrcoef(np.arange(n), permuted)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 4 / math.sqrt(n)
    assert np.mean(np.abs(np.diff(permuted)) <= 10) < 5 * 20 / n


@pytest.mark.parametrize("lengths", [(), (500,), (13, 1, 2, 400, 5, 5), (10, 10, 10)])
def test_every_token_but_the_first_is_predicted_once(lengths, tmp_path):
    sequences = TokenDataset(token_array(tmp_path, np.arange(1001, dtype=np.uint16), *lengths), 10)
    batch = sequences.batch(np.arange(len(sequences)))
    assert batch.shape == (100, 11)
    assert len(TokenDataset(TokenArray.in_memory(np.arange(1000)), 10)) == 99, "the last token needs a predecessor"
    assert batch[:, 1:].flatten().tolist() == list(range(1, 1001))
    assert torch.equal(batch[:, 1:][:, :-1], batch[:, :-1][:, 1:])


def test_unigram_entropy():
    assert unigram_entropy(np.array([5, 5, 5])) == 0
    assert unigram_entropy(np.array([0, 1, 2, 3] * 10)) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 0, 1])) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_cached_order_equals_the_order():
    cached, reference = Order(101, seed=7), order(np.arange(20_000), 101, seed=7)
    for first, rows in ((0, 8), (8, 8), (95, 7), (4090, 16), (3, 5), (9000, 9000), (50, 0)):
        assert cached(first, rows).tolist() == reference[first : first + rows].tolist()


@pytest.mark.parametrize("lengths", [(), (13, 20)])
def test_tokens_are_read_in_pieces_of_any_length(lengths, tmp_path):
    array = token_array(tmp_path, np.arange(50, dtype=np.uint16), *lengths)
    starts = np.array([0, 9, 13, 31, 33, 40])
    for length in (5, 10, 1):
        assert array.rows(starts, length).tolist() == [[*range(start, start + length)] for start in starts]
    for nothing in (array.rows(np.array([], np.int64), 5), array.read(3, 3)):
        assert nothing.size == 0 and nothing.dtype == np.uint16
    assert array.rows(np.array([], np.int64), 5).shape == (0, 5)
