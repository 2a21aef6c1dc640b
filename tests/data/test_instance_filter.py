"""Sequences with repeated n-grams are masked, as in OLMo 2, and in the same way on any number of ranks."""

import numpy as np
import pytest
import torch

from data import BatchCorruption, BatchShare, Corpus, ShuffledDataset, Source, StreamingDataset, TokenDataset
from data.config import InstanceFilterConfig
from data.instance_filter import has_repetition
from data.loader import TrainLoader
from data.tokenizer import train_tokenizer
from tests.data.arrays import token_array

STEPS, LENGTH = 6, 40


def brute_force(row: list[int], low: int, high: int, count: int) -> bool:
    """Whether the row has an n-gram of `low` to `high` tokens that is written `count` times in a row."""
    return any(
        row[start : start + period] * count == row[start : start + period * count]
        for period in range(low, high + 1)
        for start in range(len(row) - period * count + 1)
    )


def settings(low: int = 1, high: int = 13, count: int = 32) -> InstanceFilterConfig:
    return InstanceFilterConfig(
        enabled=True, repetition_min_period=low, repetition_max_period=high, repetition_max_count=count
    )


@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_rows_are_masked_as_by_brute_force(count, dtype):
    """Of few different tokens, many rows have short repetitions. Each row may have one that is put in, and broken."""
    rng = np.random.default_rng(count)
    found = expected = 0
    for _ in range(120):
        low = int(rng.integers(1, 4))
        high = low + int(rng.integers(0, 6))
        rows = rng.integers(0, rng.integers(2, 5), (6, int(rng.integers(1, 70)))).astype(dtype)
        for row in rows:
            period = int(rng.integers(1, 10))
            length = min(len(row), period * count + int(rng.integers(-1, 2)))
            start = int(rng.integers(0, len(row) - length + 1))
            row[start : start + length] = np.resize(rng.integers(0, 9, period), length)
        masked = has_repetition(rows, settings(low, high, count)).tolist()
        assert masked == [brute_force(row.tolist(), low, high, count) for row in rows]
        found, expected = found + sum(masked), expected + len(masked)
    assert expected / 20 < found < expected * 19 / 20, "both outcomes occur"


@pytest.mark.parametrize("period", [1, 2, 7, 13])
def test_32_repetitions_anywhere_are_masked_and_31_are_not(period):
    for start in (0, 1, 5, 2049 - 32 * period):
        rows = np.tile(np.arange(2049), (2, 1))
        for row, times in zip(rows, (31, 32), strict=True):
            row[start : start + times * period] = np.tile(3000 + np.arange(period), times)
        assert has_repetition(rows, settings()).tolist() == [False, True]
    assert not has_repetition(np.tile(np.arange(14), (1, 146)), settings()).any(), "a period of 14 tokens"


def test_rows_that_are_too_short_have_no_repetition():
    ones = np.ones((3, 40), np.uint16)
    assert has_repetition(ones, settings()).all() and not has_repetition(ones, settings(low=2)).any()
    assert not has_repetition(ones[:, :31], settings()).any() and not has_repetition(ones[:, :0], settings()).any()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox jumps over the lazy dog " * 40], 300)


@pytest.fixture
def loader(tmp_path, tokenizer):
    """Make loaders of text of which every third document is one letter, with a corrupted batch at step 4."""
    texts = ["a " * 70 if i % 9 == 0 else f"the lazy dog jumps over fox number {i} " for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    prepared = ShuffledDataset(
        TokenDataset(token_array(tmp_path, np.concatenate(tokenizer.encode(texts))), LENGTH), seed=1
    )

    def make(kind=None, rank=0, world=1, micro=8, sequences=prepared, config=None, skipped=0) -> TrainLoader:
        corruption = BatchCorruption({4: kind}, 1, tokenizer) if kind else None
        config = settings(count=9) if config is None else config
        share = BatchShare(8, micro, rank, world)
        return TrainLoader(sequences, "f", STEPS, share, corruption, skipped, instance_filter=config)

    return make


def global_batches(*loaders: TrainLoader) -> list[tuple[list[list[int]], list[bool], set[int]]]:
    """Rows, mask and said numbers of masked rows of each global batch, over all ranks."""
    micro = [batch for batches in zip(*loaders, strict=True) for batch in batches]
    per_step = len(micro) // STEPS
    found = []
    for i in range(0, len(micro), per_step):
        parts = micro[i : i + per_step]
        rows = torch.cat([batch.tokens for batch in parts]).tolist()
        masks = [batch.instance_mask for batch in parts]
        assert len({mask is None for mask in masks}) == 1, "all parts of a batch have a mask, or none"
        mask = [True] * len(rows) if masks[0] is None else torch.cat(masks).tolist()
        found.append((rows, mask, {batch.masked_rows for batch in parts}))
    return found


def test_mask_is_that_of_each_row_on_any_number_of_ranks(loader):
    expected = global_batches(loader())
    for rows, mask, masked in expected:
        assert mask == [not brute_force(row, 1, 13, 9) for row in rows] and masked == {mask.count(False)}
    assert len({tuple(masked) for *_, masked in expected}) > 2
    for world, micro in ((1, 2), (2, 4), (2, 1), (4, 1)):
        assert global_batches(*(loader(None, rank, world, micro) for rank in range(world))) == expected


def test_stream_is_masked_as_prepared_tokens_are_by_their_rows(loader, tokenizer, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    corpus = Corpus((Source(name="text", path=str(tmp_path / "text.txt")),), tokenizer=str(tmp_path / "tokenizer"))

    def stream(rank: int, world: int, micro: int) -> TrainLoader:  # blocks end within global batches
        return loader(None, rank, world, micro, StreamingDataset(corpus, tokenizer, 0.0, LENGTH, 1, 5 * LENGTH))

    expected = global_batches(stream(0, 1, 8))
    assert any(0 < mask.count(False) < 8 for _, mask, _ in expected)
    for rows, mask, masked in expected:
        assert mask == [not brute_force(row, 1, 13, 9) for row in rows] and masked == {mask.count(False)}
    assert global_batches(*(stream(rank, 2, 2) for rank in range(2))) == expected
    resumed, position = stream(0, 1, 4), stream(0, 1, 8)
    for _, _batch in zip(range(3), position, strict=False):
        pass
    resumed.load_state_dict(position.state_dict())
    batch = next(iter(resumed))
    assert batch.tokens.tolist() == expected[3][0][:4] and batch.masked_rows == expected[3][1].count(False)


def test_corrupted_batches_are_filtered_too(loader):
    """Repeated n-grams and tokens are found; a batch of which all rows are masked has no mask."""
    ngrams = list(loader("repeated_ngrams", config=settings()))
    assert [batch.masked_rows for batch in ngrams][3] == 8 and ngrams[3].instance_mask is None
    assert [batch.masked_rows for batch in loader("random", config=settings())][3] == 0
    resumed = loader("repeat", micro=2, config=settings(), skipped=1)
    assert [batch.masked_rows for batch in resumed][12:16] == [8] * 4, "steps count without skipped batches"


def test_shuffled_labels_keep_the_mask_of_their_inputs(loader):
    clean, shuffled = list(loader(micro=4)), list(loader("labels", micro=4))
    for one, other in zip(clean, shuffled, strict=True):
        assert one.masked_rows == other.masked_rows and torch.equal(one.tokens, other.tokens)
    assert shuffled[6].targets.shape == (4, LENGTH) and not torch.equal(shuffled[6].targets, shuffled[6].tokens[:, 1:])
