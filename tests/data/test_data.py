"""Documents, tokens and their order."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from data import (
    Document,
    SequenceLoader,
    Sequences,
    prepare,
    read_documents,
    split_documents,
    unigram_entropy,
)
from data.sequences import order
from data.tokenizer import END_OF_TEXT, train_tokenizer
from data.tokens import encode
from tests.conftest import CHECKOUT


def test_the_embedded_corpus_is_whole():
    documents = read_documents(None)
    assert len(documents) == 249
    assert sum(len(d.text.encode()) for d in documents) > 12_000_000


def test_a_document_is_held_out_by_its_content_alone():
    documents = read_documents(None)
    train, test = split_documents(documents, 0.05)
    assert len(train) + len(test) == 249 and 5 <= len(test) <= 25
    assert not {d.digest for d in train} & {d.digest for d in test}
    renamed = [d._replace(name=f"x{i}") for i, d in enumerate(reversed(documents))]
    assert {d.digest for d in split_documents(renamed, 0.05)[1]} == {d.digest for d in test}
    fewer = split_documents(documents[:100], 0.05)[1]
    assert {d.digest for d in fewer} == {d.digest for d in test} & {d.digest for d in documents[:100]}


def test_both_sides_of_a_small_split_have_something(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    documents = read_documents(str(tmp_path))
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        train, test = split_documents(documents, fraction)
        assert len(train) == len(test) == 1
    with pytest.raises(ValueError, match="all the same text"):
        split_documents([documents[0], documents[0]], 0.5)


def test_any_bytes_come_back():
    tokenizer = train_tokenizer(["the quick brown fox " * 50], 300)
    texts = [
        "naïve café — 東京 🎉\x00\x01\r\n\t  spaces",
        "".join(map(chr, range(0x250))),
        "\U0010ffff\ud7ff",
        END_OF_TEXT,
    ]
    rng = np.random.default_rng(0)
    texts += [bytes(rng.integers(0, 256, 200, dtype=np.uint8)).decode("latin-1") for _ in range(20)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_document_cannot_spell_a_boundary():
    tokenizer = train_tokenizer(["some text"], 300)
    text = f"before{END_OF_TEXT}after"
    tokens = encode(tokenizer, [Document("d", text, "")])
    assert (tokens == 0).nonzero()[0].tolist() == [len(tokens) - 1]
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == text


def test_tokens_are_prepared_once_and_say_what_they_are(corpus, tmp_path):
    said: list[str] = []
    settings = {"path": str(corpus), "vocab_size": 300, "test_fraction": 0.2, "sequence_length": 16, "cache": tmp_path}
    first = prepare(**settings, say=said.append)
    assert said
    said.clear()
    again = prepare(**settings, say=said.append)
    assert not said and again.fingerprint == first.fingerprint
    assert np.array_equal(first.train, again.train) and first.train.dtype == np.uint16
    assert [p.name for p in tmp_path.iterdir()] == [first.folder.name]
    documents = read_documents(str(corpus))
    ends = int((first.train == 0).sum()) + int((first.test == 0).sum())
    assert ends == len(documents) == first.facts["train"]["documents"] + first.facts["test"]["documents"]
    other = prepare(**{**settings, "vocab_size": 301}, say=said.append)
    assert other.fingerprint != first.fingerprint


def test_the_tokens_depend_on_the_texts_not_on_their_names(corpus, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for i, file in enumerate(sorted(corpus.glob("*.txt"), reverse=True)):
        (renamed / f"{i:03}.txt").write_text(file.read_text())
    one = prepare(str(corpus), 300, 0.2, 16, tmp_path / "one")
    two = prepare(str(renamed), 300, 0.2, 16, tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    assert np.array_equal(one.train, two.train) and np.array_equal(one.test, two.test)


def test_damaged_tokens_are_named(corpus, tmp_path):
    tokens = prepare(str(corpus), 300, 0.2, 16, tmp_path)
    file = tokens.folder / "train.npy"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="remove that folder"):
        prepare(str(corpus), 300, 0.2, 16, tmp_path)


def test_what_a_killed_preparation_left_is_not_taken_for_tokens(corpus, tmp_path):
    """Kill the process as soon as anything appears in the cache; then prepare again."""
    code = (
        "import sys, data; from pathlib import Path;"
        f"data.prepare({str(corpus)!r}, 300, 0.2, 16, Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(tmp_path.iterdir()):
        pass
    process.kill()
    process.wait()
    tokens = prepare(str(corpus), 300, 0.2, 16, tmp_path)
    assert len(tokens.train) == tokens.facts["train"]["tokens"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_each_epoch_is_a_permutation_and_no_two_are_alike(count):
    epochs = [order(np.arange(e * count, (e + 1) * count), count, seed=3) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert not np.array_equal(epochs[0], order(np.arange(count), count, seed=4))


def test_any_position_can_be_asked_for_alone():
    whole = order(np.arange(500), 101, seed=7)
    assert [int(order(np.array([p]), 101, seed=7)[0]) for p in range(500)] == whole.tolist()


def test_the_order_is_well_mixed():
    """Displacements and neighbours look like those of a random permutation."""
    n = 20_000
    permuted = order(np.arange(n), n, seed=0).astype(float)
    assert abs(np.corrcoef(np.arange(n), permuted)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 4 / math.sqrt(n)
    assert np.mean(np.abs(np.diff(permuted)) <= 10) < 5 * 20 / n


def test_every_token_but_the_first_is_predicted_once():
    sequences = Sequences(np.arange(1001, dtype=np.uint16), 10)
    batch = sequences.batch(np.arange(len(sequences)))
    assert batch.shape == (100, 11)
    assert batch[:, 1:].flatten().tolist() == list(range(1, 1001))
    assert torch.equal(batch[:, 1:][:, :-1], batch[:, :-1][:, 1:])


def loader(**changes) -> SequenceLoader:
    settings = dict(fingerprint="f", seed=1, steps=20, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
    return SequenceLoader(Sequences(np.arange(501, dtype=np.uint16), 10), **{**settings, **changes})


def global_batches(world: int, micro: int, start: int = 0) -> list[list[int]]:
    """First tokens of the sequences of each step, over all ranks."""
    ranks = [loader(rank=r, world_size=world, micro_batch_size=micro) for r in range(world)]
    for rank in ranks:
        rank.load_state_dict({"sequences_consumed": start, "fingerprint": "f"})
    per_step = 8 // (world * micro)
    rows = [torch.cat(parts)[:, 0].tolist() for parts in zip(*ranks, strict=True)]
    return [[t for row in rows[i : i + per_step] for t in row] for i in range(0, len(rows), per_step)]


def test_the_global_batches_do_not_depend_on_ranks_or_micro_batch():
    expected = global_batches(1, 8)
    assert len(expected) == 20
    for world, micro in ((1, 1), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        assert global_batches(world, micro) == expected
        assert global_batches(world, micro, start=7 * 8) == expected[7:]


def test_the_position_is_one_number_and_other_tokens_are_refused():
    one = loader()
    batches = iter(one)
    for _ in range(5):
        next(batches)
    assert one.state_dict() == {"sequences_consumed": 40, "fingerprint": "f"}
    two = loader()
    two.load_state_dict(one.state_dict())
    assert torch.equal(next(iter(two)), next(batches))
    with pytest.raises(ValueError, match="tokens f, but these are g"):
        loader(fingerprint="g").load_state_dict(one.state_dict())


def test_unigram_entropy():
    assert unigram_entropy(np.array([5, 5, 5])) == 0
    assert unigram_entropy(np.array([0, 1, 2, 3] * 10)) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 0, 1])) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
