"""A streamed text yields the batches of the prepared text, from any position and on any number of ranks."""

import hashlib
import itertools
import json
import random
import threading

import numpy as np
import pytest
import torch

import data.stream_head
from data import (
    BatchShare,
    Corpus,
    Mixture,
    ShuffledDataset,
    Source,
    SourceError,
    StreamingDataset,
    TokenDataset,
    TrainLoader,
    prepare,
)
from data.tokenizer import load_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, corpus) -> Corpus:
    """Two sources of short documents, one in three files, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("stream")
    words = " ".join(p.read_text() for p in sorted(corpus.glob("*.txt"))).split()
    rng = random.Random(0)
    rows = [
        json.dumps({"text": " ".join(words[i : i + rng.randint(5, 60)])})
        for i in rng.sample(range(len(words) - 60), 1200)
    ]
    (folder / "a").mkdir()
    for i in range(3):
        (folder / "a" / f"{i}.jsonl").write_text("\n".join(rows[i * 300 : (i + 1) * 300]))
    (folder / "b.jsonl").write_text("\n".join(rows[900:]))
    sources = (Source(name="a", path=str(folder / "a"), weight=3), Source(name="b", path=str(folder / "b.jsonl")))
    tokens = prepare(Corpus(sources, vocab_size=400, val_fraction=0.1), folder / "cache", LENGTH)
    return Corpus(sources, tokenizer=str(tokens.folder), val_fraction=0.1)


def streamed(corpus: Corpus, block_tokens: int = 1 << 20, **changes) -> StreamingDataset:
    corpus = Corpus(**{**vars(corpus), "streamed": True, **changes})
    return StreamingDataset(corpus, load_tokenizer(corpus.tokenizer), corpus.val_fraction, LENGTH, 7, block_tokens)


@pytest.fixture(autouse=True)
def small_document_batches(monkeypatch):
    """Encode so few documents at once that a block needs several batches of them."""
    monkeypatch.setattr(data.encoding.document_batches, "__defaults__", (3000,))


@pytest.mark.parametrize("max_tokens", [None, 5000])
def test_text_of_one_block_has_the_batches_of_prepared_tokens(corpus, max_tokens, tmp_path):
    corpus = Corpus(**{**vars(corpus), "max_tokens": max_tokens})
    tokens = prepare(corpus, tmp_path, LENGTH)
    prepared = ShuffledDataset(TokenDataset(tokens.train, LENGTH), seed=7)
    stream = streamed(corpus)
    for first in range(0, 2 * len(prepared) + 40, 40):
        actual, expected = stream.take(first, 40), prepared.take(first, 40)
        assert torch.equal(actual, expected) and actual.dtype == expected.dtype
    stream.close()


def test_each_block_yields_its_sequences_once(corpus, tmp_path):
    reference = TokenDataset(prepare(corpus, tmp_path, LENGTH).train, LENGTH)
    stream, block = streamed(corpus, 50 * LENGTH), 50
    before: list[list[int]] = []
    for epoch in range(2):
        order = []
        for begin in range(0, len(reference), block):
            count = min(block, len(reference) - begin)
            taken = stream.take(epoch * len(reference) + begin, count)
            indices = np.arange(begin, begin + count)
            rows = {tuple(row): i for i, row in zip(indices, reference.batch(indices).tolist(), strict=True)}
            order.append([rows.pop(tuple(row)) for row in taken.tolist()])
            assert not rows
        assert all(block_order != sorted(block_order) for block_order in order if len(block_order) > 3)
        assert order != before
        before = order
    stream.close()


def test_block_has_a_sequence_at_least(corpus, tmp_path):
    reference = TokenDataset(prepare(corpus, tmp_path, LENGTH).train, LENGTH)
    stream = streamed(corpus, block_tokens=1)
    assert torch.equal(stream.take(0, 5), reference.batch(np.arange(5)))
    with pytest.raises(ValueError, match="sequence 3 of the run is before the block that is in memory"):
        stream.take(3, 1)
    stream.close()


def rows_of(loaders: list[TrainLoader]) -> list[list[list[int]]]:
    """The rows of each step, over all ranks."""
    per_step = loaders[0].share.global_batch_size // loaders[0].per_forward
    rows = [[row for batch in batches for row in batch.tokens.tolist()] for batches in zip(*loaders, strict=True)]
    return [list(itertools.chain(*rows[i : i + per_step])) for i in range(0, len(rows), per_step)]


def test_stream_with_max_tokens_resumes_from_any_block(corpus):
    reference, taken, states = streamed(corpus, 9 * LENGTH, max_tokens=4000), [], []
    for first in range(0, 900, 3):
        taken.append(reference.take(first, 3))
        states.append(json.dumps(reference.state()))
    reference.close()
    for saved in range(0, len(states) - 1, 17):
        resumed = streamed(corpus, 9 * LENGTH, max_tokens=4000)
        resumed.load_state(json.loads(states[saved]))
        for i in range(saved + 1, min(saved + 40, len(taken))):
            assert torch.equal(resumed.take(3 * i, 3), taken[i])
        resumed.close()
    with pytest.raises(
        ValueError, match="trained on blocks of 9 sequences of 16 tokens, but these are blocks of 8 of 16"
    ):
        streamed(corpus, 8 * LENGTH).load_state(json.loads(states[0]))


def test_closing_ends_the_threads(corpus):
    before = set(threading.enumerate())
    stream = streamed(corpus, 37 * LENGTH)
    stream.take(0, 1)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(RuntimeError, match="the stream is closed"):
        stream.take(10_000, 1)


def test_changed_source_is_reported(tmp_path, corpus):
    (tmp_path / "text").mkdir()
    source = (Source(name="c", path=str(tmp_path / "text")),)
    lines = '{"text": "some words here"}\n' * 500
    for change, message in (
        (lambda: (tmp_path / "text" / "b.jsonl").write_text(""), "has changed since it was opened: it must"),
        (lambda: (tmp_path / "text" / "a.jsonl").unlink(), "(has changed|cannot be read: .*the file does not exist)"),
        (
            lambda: (tmp_path / "text").rename(tmp_path / "elsewhere"),
            "(does not exist|cannot be read: .*the file does not exist)",
        ),
    ):
        for name in "abc":
            (tmp_path / "text" / f"{name}.jsonl").write_text(lines)
        stream = streamed(corpus, 50 * LENGTH, sources=source, val_fraction=0.0)
        stream.take(0, 1)
        change()
        state = stream.state()
        with pytest.raises(SourceError, match=rf"sources.c.path={tmp_path}/text {message}"):
            stream.take(100_000, 1)
        stream.load_state(state)
        with pytest.raises(SourceError, match=rf"sources.c.path={tmp_path}/text (has changed|does not exist)"):
            stream.take(0, 1)


def test_source_changed_within_an_epoch_is_reported_with_the_next_block(tmp_path, corpus):
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / f"{name}.jsonl").write_text('{"text": "some words here"}\n' * 5000)
    stream = streamed(corpus, 50 * LENGTH, sources=(Source(name="c", path=str(tmp_path / "text")),), val_fraction=0.0)
    stream.take(0, 1)
    (tmp_path / "text" / "d.jsonl").write_text('{"text": "other words here"}\n' * 5000)
    stream.take(1, 1)
    with pytest.raises(SourceError, match="has changed since it was opened: it must stay as it is"):
        stream.take(50, 1)


def test_long_documents_do_not_raise_the_held_out_share(tmp_path, monkeypatch):
    monkeypatch.setattr(data.stream_head, "HEAD_BYTES", 1000)
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"{i} words without an end " * 100)
    corpus = Corpus((Source(name="s", path=str(tmp_path / "text")),), vocab_size=300, val_fraction=1e-4, streamed=True)
    head = prepare(corpus, tmp_path / "cache", 16)
    assert head.facts["threshold"] <= 0.11 and head.facts["test"]["documents"] >= 1


def test_stream_resumes_from_any_step_on_any_number_of_ranks(corpus):
    steps, batch = 120, 24  # of 1,700 sequences: more than an epoch, and some batches cross the border of two blocks

    def loaders(world: int = 1, micro: int = batch, state: str | None = None) -> list[TrainLoader]:
        ranks = []
        for rank in range(world):
            sequences = streamed(corpus, 37 * LENGTH)
            ranks.append(TrainLoader(sequences, "f", steps, BatchShare(batch, micro, rank, world)))
            if state:
                ranks[-1].load_state_dict(json.loads(state))
        return ranks

    (reference,) = loaders()
    expected, states = [], [json.dumps(reference.state_dict())]
    for taken in reference:
        expected.append(taken.tokens.tolist())
        states.append(json.dumps(reference.state_dict()))
    assert len(expected) == steps
    for world, micro in ((1, 4), (2, 12), (4, 3)):
        assert rows_of(loaders(world, micro)) == expected
    for done in (1, 71, 72, 99, 118):
        assert rows_of(loaders(done % 2 + 1, 6, states[done])) == expected[done:]
    assert rows_of(loaders(state=states[-1])) == []
    other_blocks = TrainLoader(streamed(corpus, 36 * LENGTH), "f", steps, BatchShare(batch, batch))
    with pytest.raises(ValueError, match="trained on blocks of 37 sequences of 16 tokens, but these are blocks of 36"):
        other_blocks.load_state_dict(json.loads(states[1]))


def test_held_out_documents_are_the_prepared_ones_and_never_trained_on(corpus, tmp_path):
    prepared = prepare(corpus, tmp_path, LENGTH)
    head = prepare(Corpus(**{**vars(corpus), "streamed": True}), tmp_path, LENGTH)
    tokenizer = load_tokenizer(corpus.tokenizer)
    held_out = [d.text for d in Mixture(corpus.sources) if d.hash_fraction < 0.1]
    stream, rows = streamed(corpus), []
    while stream.state()["stream"]["block"] == 0:  # the sequences of an epoch
        rows.append(stream.take(len(rows), 1)[0])
    trained = tokenizer.tokenizer.decode(torch.cat(rows[:-1]).tolist())
    assert len(trained) > 100_000 and len(held_out) > 50
    assert not any(text in trained for text in held_out)
    stream.close()
    assert head.test.read(0, len(head.test)).tolist() == prepared.test.read(0, len(prepared.test)).tolist()
    assert len(head.train) == 0 and head.facts["threshold"] == 0.1
    assert head.fingerprint != prepared.fingerprint and head.folder != prepared.folder
    longer = prepare(Corpus(**{**vars(corpus), "streamed": True, "max_tokens": 10**9}), tmp_path, LENGTH)
    assert longer.test.read(0, len(longer.test)).tolist() == head.test.read(0, len(head.test)).tolist()
    assert longer.fingerprint != head.fingerprint, "a stream is identified by its settings"
    cached = prepare(Corpus(**{**vars(corpus), "streamed": True}), tmp_path, LENGTH)
    assert cached.fingerprint == head.fingerprint


def test_enough_of_a_long_text_is_held_out(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(data.stream_head, "HEAD_BYTES", 60_000)
    monkeypatch.setattr(data.stream_head, "HELD_OUT_BYTES", 4_000)
    head = prepare(Corpus(**{**vars(corpus), "streamed": True, "val_fraction": 1e-4}), tmp_path, LENGTH)
    threshold = head.facts["threshold"]
    assert 0.01 < threshold < 0.1 and 4_000 <= head.facts["test"]["bytes"] < 4_500
    texts, size = [], 0
    for document in Mixture(corpus.sources):
        if document.hash_fraction < threshold:
            texts.append(document.text)
        size += document.size
        if size >= 60_000:
            break
    tokenizer = load_tokenizer(corpus.tokenizer)
    assert head.test.read(0, len(head.test)).tolist() == np.concatenate(tokenizer.encode(texts)).tolist()


def test_text_that_ends_within_the_head_is_split_as_if_prepared(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} little words make up a document " * 3)
    for fraction in (1e-6, 0.5, 1 - 1e-6):
        corpus = Corpus((Source(name="text", path=str(tmp_path / "text")),), vocab_size=300, val_fraction=fraction)
        prepared = prepare(corpus, tmp_path / "cache", 4)
        head = prepare(Corpus(**{**vars(corpus), "streamed": True}), tmp_path / "cache", 4)
        assert head.test.read(0, len(head.test)).tolist() == prepared.test.read(0, len(prepared.test)).tolist()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("the same")
    with pytest.raises(ValueError, match="all the same text"):
        prepare(Corpus(**{**vars(corpus), "streamed": True}), tmp_path / "cache", 4)


def test_corpus_that_cannot_be_streamed_is_one_sentence(corpus, tmp_path):
    with pytest.raises(ValueError, match="deduplicate=true is not possible with data"):
        Corpus(**{**vars(corpus), "streamed": True, "deduplicate": True}).check(tmp_path, LENGTH)
    with pytest.raises(ValueError, match="sequence_length=100000 is longer than the text: the test text has"):
        prepare(Corpus(**{**vars(corpus), "streamed": True}), tmp_path, 100_000)
    everything_held_out = streamed(corpus, val_fraction=1.0)
    with pytest.raises(SourceError, match="sequence_length=16 is longer than the text: the training text has 0 tokens"):
        everything_held_out.take(0, 1)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "some words here"}\n' * 3000)
    (tmp_path / "text" / "b.jsonl").write_text('{"text": "some words here"}\n' * 10 + '{"text": ')
    broken = streamed(corpus, 50 * LENGTH, sources=(Source(name="c", path=str(tmp_path / "text")),), val_fraction=0.0)
    broken.take(0, 1)
    with pytest.raises(SourceError, match=rf"sources.c.path={tmp_path}/text cannot be read: .*b.jsonl: "):
        broken.take(4000, 1)


def test_tiny_stream_holds_out_the_same_documents_as_if_prepared(tmp_path):
    """Even if the document with the lowest hash occurs several times."""
    texts = [f"document {i} of some words" for i in range(60)]
    fraction = {text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 256**6 for text in texts}
    above_limit = sorted((text for text in texts if fraction[text] > 0.12), key=fraction.__getitem__)[:6]
    lowest = above_limit[0]
    rows = [above_limit[3], lowest, *above_limit[1:], lowest, lowest]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    sources = (Source(name="s", path=str(tmp_path / "text.jsonl")),)
    heads = [
        prepare(Corpus(sources, vocab_size=300, val_fraction=0.01, streamed=streamed), tmp_path / "cache", 8)
        for streamed in (False, True)
    ]
    prepared, streamed = (head.facts["test"] for head in heads)
    assert prepared["documents"] == streamed["documents"] == 3
    assert prepared["tokens"] == streamed["tokens"]
