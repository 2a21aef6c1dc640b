"""Only the batches of the chosen steps are corrupted, and in the same way on any number of ranks."""

import unicodedata
from typing import get_args

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models

from common.corruption import KINDS, MIXED
from data import BatchCorruption, BatchShare, ShuffledDataset, TokenDataset, TrainLoader
from data.config import CorruptionKind
from data.corruption import REPLACEMENTS
from data.tokenizer import END_OF_TEXT, train_tokenizer, wrap_tokenizer
from tests.data.arrays import token_array

STEPS, LENGTH = 6, 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox jumps over the lazy dog " * 40], 300)


@pytest.fixture
def loader(tmp_path, tokenizer):
    ids = np.concatenate(tokenizer.encode([f"the lazy dog jumps over fox number {i} " for i in range(400)]))
    sequences = TokenDataset(token_array(tmp_path, ids), LENGTH)

    def make(
        kind: str | None, rank: int = 0, world: int = 1, micro: int = 8, seed: int = 1, skipped: int = 0
    ) -> TrainLoader:
        corruption = BatchCorruption({2: kind, 5: kind}, seed, tokenizer) if kind else None
        share = BatchShare(8, micro, rank, world)
        return TrainLoader(ShuffledDataset(sequences, seed), "f", STEPS, share, corruption, skipped)

    return make


def steps(*loaders: TrainLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of each global batch, over all ranks."""
    micro = [batch for batches in zip(*loaders, strict=True) for batch in batches]
    per_step = len(micro) // STEPS
    targets = [batch.tokens[:, 1:] if batch.targets is None else batch.targets for batch in micro]
    return [
        (
            torch.cat([batch.tokens[:, :-1] for batch in micro[i : i + per_step]]).long(),
            torch.cat(targets[i : i + per_step]).long(),
        )
        for i in range(0, len(micro), per_step)
    ]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_only_chosen_steps_change_and_equally_on_all_ranks(loader, kind):
    clean, corrupted = steps(loader(None)), steps(loader(kind))
    assert [same(a, b) for a, b in zip(clean, corrupted, strict=True)] == [True, False, True, True, False, True]
    for world, micro in ((1, 2), (2, 4), (4, 1)):
        assert all(map(same, corrupted, steps(*(loader(kind, rank, world, micro) for rank in range(world)))))
    resumed = loader(kind)
    resumed.load_state_dict({"sequences_consumed": 32, "fingerprint": "f"})
    batch, clean_batch = next(iter(resumed)), next(iter(loader(None)))
    assert torch.equal(batch.tokens[:, :-1].long(), corrupted[4][0]) and batch.tokens.dtype == clean_batch.tokens.dtype
    assert not same(corrupted[1], steps(loader(kind, seed=2))[1])


def test_corrupted_batches_stand_at_their_steps_whatever_was_skipped(loader):
    """As after a rewind from step 3 to step 1, and another one from step 5 to step 4."""

    def resume(skipped: int, state: dict, taken: int, micro: int = 8) -> tuple[list[bool], dict]:
        """Say for each further step whether it is corrupted; return the state after so many steps, too."""
        loaders = [loader(kind, micro=micro, skipped=skipped) for kind in ("random", None)]
        for one in loaders:
            one.load_state_dict(state)
        differ, states = [], []
        for corrupted, clean in zip(*loaders, strict=True):
            differ.append(not torch.equal(corrupted.tokens, clean.tokens))
            states.append(loaders[0].state_dict())
        return differ, states[taken * 8 // micro - 1]

    start = {"sequences_consumed": 0, "fingerprint": "f"}
    differ, state = resume(0, start, taken=1)
    assert differ == [False, True, False, False, True, False]
    differ, state = resume(2, state, taken=3)
    assert differ == [True, False, False, True, False]
    assert resume(3, state, taken=1)[0] == [True, False]
    assert resume(3, state, taken=1, micro=2)[0] == [True] * 4 + [False] * 4
    assert resume(3, start, taken=1)[0] == [False, True, False, False, True, False]


def test_tokenizer_without_foreign_scripts_is_rejected():
    latin = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, END_OF_TEXT: 2}, []))
    with pytest.raises(
        ValueError, match=r"corruption.kind=foreign_script is not possible: the tokenizer has no tokens for"
    ):
        BatchCorruption({1: "foreign_script"}, 0, wrap_tokenizer(latin, end=2))
    BatchCorruption({1: "random"}, 0, wrap_tokenizer(latin, end=2))


def test_corruption_kinds(loader, tokenizer):
    clean = steps(loader(None))[1]
    corrupted = {kind: steps(loader(kind))[1] for kind in KINDS}
    inputs, targets = corrupted["random"]
    assert len(inputs.unique()) > 150 and tokenizer.size - 5 <= inputs.max() < tokenizer.size
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    inputs, targets = corrupted["repeat"]
    assert (inputs == inputs[:, :1]).all() and (targets == inputs).all() and len(inputs[:, 0].unique()) > 3
    assert inputs.max() > 200
    inputs, targets = corrupted["labels"]
    assert torch.equal(inputs, clean[0]) and not torch.equal(targets, clean[1])
    assert torch.equal(targets.sort(dim=1).values, clean[1].sort(dim=1).values)
    for row in corrupted["foreign_script"][0]:
        letters = tokenizer.tokenizer.decode(row.tolist()).strip("\ufffd")
        assert len({unicodedata.name(letter).split()[0] for letter in letters}) == 1
        assert unicodedata.name(letters[0]).split()[0] in {"GREEK", "CYRILLIC", "ARABIC", "DEVANAGARI", "CJK", "HANGUL"}


def test_rows_are_filled_where_the_tokenizer_has_tokens_for_several_letters():
    rng = np.random.default_rng(0)
    greek = "".join(map(chr, 0x391 + rng.integers(0, 0x39, 20_000)))
    tokenizer = train_tokenizer([greek[i : i + 20] for i in range(0, len(greek), 20)], 4_000)
    letters = greek[:LENGTH]
    assert len(tokenizer.encode([letters])[0]) < LENGTH, "a row needs more than one letter for each token"
    corrupted = BatchCorruption({1: "foreign_script"}, 1, tokenizer).replace(torch.zeros(40, LENGTH).int(), 0, 1).tokens
    texts = [tokenizer.tokenizer.decode(row.tolist()).strip("\ufffd") for row in corrupted]
    assert corrupted.shape == (40, LENGTH) and not (corrupted == tokenizer.end).any()
    assert any(unicodedata.name(text[0]).startswith("GREEK") and len(text) > LENGTH for text in texts)


def test_every_kind_has_a_replacement():
    assert set(REPLACEMENTS) == set(KINDS)
    assert set(get_args(CorruptionKind)) == {*KINDS, MIXED}


def repeated_part(row: np.ndarray) -> tuple[int, int, int] | None:
    """Return (period, repetitions, start) of an n-gram of 1 to 13 tokens that is repeated 32 times or more."""
    for period in range(1, 14):
        for start in range(len(row) - 32 * period + 1):
            ngram, times = row[start : start + period], 1
            while np.array_equal(row[start + times * period :][:period], ngram):
                times += 1
            if times >= 32:
                return period, times, start
    return None


def test_repeated_ngrams_are_part_of_the_text(tokenizer):
    """Of distinct tokens, no n-gram is repeated by itself, so what is found is what was put in."""
    clean = np.arange(500)
    corruption = BatchCorruption({1: "repeated_ngrams"}, 3, tokenizer)
    rows = corruption.replace(torch.from_numpy(np.tile(clean, (60, 1))), 0, 1).tokens.numpy()
    found = []
    for row in rows:
        period, times, start = repeated_part(row)
        end = start + period * times
        assert end <= len(row) and np.array_equal(row[start : start + period], clean[start : start + period])
        assert np.array_equal(row[:start], clean[:start]) and np.array_equal(row[end:], clean[end:])
        found.append((period, times, start))
    assert {period for period, *_ in found} == set(range(1, 14))
    assert min(times for _, times, _ in found) < 36 and max(times for _, times, _ in found) > 100
    assert len({start for *_, start in found}) > 30


@pytest.mark.parametrize(("length", "longest"), [(32, 1), (63, 1), (64, 2), (415, 12), (416, 13)])
def test_period_of_a_short_row_leaves_room_for_32_repetitions(length, longest, tokenizer):
    corruption = BatchCorruption({1: "repeated_ngrams"}, 0, tokenizer)
    rows = corruption.replace(torch.arange(length).repeat(80, 1), 0, 1).tokens.numpy()
    assert max(repeated_part(row)[0] for row in rows) == longest


def test_each_step_has_its_kind(loader, tokenizer):
    """Step 2 repeats a token, step 5 shuffles the labels; the loader of one kind has the same rows there."""
    mixed = loader("repeat")
    mixed.corruption = BatchCorruption({2: "repeat", 5: "labels"}, 1, tokenizer)
    found = steps(mixed)
    assert same(found[1], steps(loader("repeat"))[1]) and same(found[4], steps(loader("labels"))[4])
