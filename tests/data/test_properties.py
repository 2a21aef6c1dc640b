"""Properties that hold for any text, order, interruption and damage: hypothesis searches for counterexamples."""

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data import (
    BatchShare,
    Corpus,
    ShuffledDataset,
    StreamingDataset,
    TokenDataset,
    Tokens,
    TrainLoader,
    load_tokenizer,
    open_tokens,
    prepare,
)
from data.tokenizer import END_OF_TEXT, train_tokenizer
from tests.data.arrays import token_array
from tests.data.preparation import corpus_of, write_lines
from tests.helpers import SLOW

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
#: Sequences per step, and the ways to divide them: numbers of ranks, and sequences per forward pass.
GLOBAL_BATCH = 12
SHARES = [(world, micro) for world in range(1, 13) for micro in range(1, 13) if GLOBAL_BATCH % (world * micro) == 0]
INTERRUPTIONS = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(SHARES)), max_size=4)


def holds_for(examples: int, *strategies: st.SearchStrategy, **named: st.SearchStrategy) -> Callable[..., None]:
    """Test the decorated function with so many examples, the same ones each time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
    )
    return lambda property_: options(given(*strategies, **named)(property_))()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words that are text, and more words of a document " * 9], 300).save(folder)
    return folder


def global_batches(
    sequences: Callable[[], ShuffledDataset | StreamingDataset],
    steps: int,
    interruptions: Sequence[tuple[int, tuple[int, int]]] = (),
) -> list[list[list[int]]]:
    """Return the rows of each step of a run that is interrupted, and resumed by other ranks from the saved state.

    An interruption is after some steps of ranks with a micro-batch size. One rank takes the last steps.
    """
    rows: list[list[list[int]]] = []
    state = None
    for taken, (world, micro) in [*interruptions, (steps, (1, GLOBAL_BATCH))]:
        loaders = [
            TrainLoader(sequences(), "f", steps, BatchShare(GLOBAL_BATCH, micro, rank, world)) for rank in range(world)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        batches = zip(*loaders, strict=True)
        for _ in range(taken):
            forwards = list(itertools.islice(batches, GLOBAL_BATCH // (world * micro)))
            if forwards:
                rows.append([row for ranks in forwards for batch in ranks for row in batch.tokens.tolist()])
        state = json.dumps(loaders[len(rows) % world].state_dict())  # that of any rank
        for loader in loaders:
            loader.sequences.close()
    return rows


@pytest.mark.parametrize("examples", [40, SLOW(300)])
def test_interrupted_runs_on_any_ranks_yield_the_batches_of_one_rank(examples, tmp_path):
    @holds_for(examples, st.data(), st.integers(), st.integers(0, 10), INTERRUPTIONS)
    def property_(data, seed, steps, interruptions):
        length = data.draw(st.integers(1, 9))
        parts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
        tokens = np.arange(length + sum(parts) + 1, dtype=np.uint16)
        array = token_array(Path(tempfile.mkdtemp(dir=tmp_path)), tokens, *parts)

        def sequences() -> ShuffledDataset:
            return ShuffledDataset(TokenDataset(array, length), seed)

        expected = global_batches(sequences, steps)
        assert len(expected) == steps and all(len(rows) == GLOBAL_BATCH for rows in expected)
        assert global_batches(sequences, steps, interruptions) == expected


@pytest.mark.parametrize("examples", [40, SLOW(300)])
def test_every_epoch_reads_every_token_once(examples, tmp_path):
    """All but the first token, and a remainder that is shorter than a sequence."""

    @holds_for(
        examples, st.lists(st.integers(1, 60), max_size=4), st.integers(1, 30), st.integers(), st.integers(0, 99)
    )
    def property_(parts, length, seed, epoch):
        tokens = np.arange(length + sum(parts) + 1, dtype=np.uint16)
        array = token_array(Path(tempfile.mkdtemp(dir=tmp_path)), tokens, *parts)
        shuffled = ShuffledDataset(TokenDataset(array, length), seed)
        rows = shuffled.take(epoch * len(shuffled), len(shuffled)).long()
        assert sorted(rows[:, 1:].flatten().tolist()) == [*range(1, len(shuffled) * length + 1)]
        assert (rows.diff() == 1).all(), "each sequence is a piece of the text"
        assert len(shuffled) == (len(tokens) - 1) // length


@pytest.mark.parametrize("examples", [100, SLOW(1000)])
def test_any_text_is_decoded_as_it_was(examples, tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))

    @holds_for(examples, st.lists(st.one_of(TEXTS, st.just(END_OF_TEXT), st.sampled_from([" ", "\x00", "\ufeff"]))))
    def property_(pieces):
        text = "".join(pieces)
        (ids,) = tokenizer.encode([text])
        assert tokenizer.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
        assert (ids == tokenizer.end).nonzero()[0].tolist() == [len(ids) - 1]
        assert ids.max() < tokenizer.size


@pytest.mark.parametrize("examples", [8, SLOW(60)])
def test_stream_has_the_sequences_of_prepared_tokens(examples, tokenizer_folder, tmp_path):
    """The sequences of each block are those at the same place of the prepared text; one block has their order too."""

    @holds_for(
        examples,
        st.lists(TEXTS, min_size=6, max_size=40),
        st.integers(1, 6),
        st.integers(1, 40),
        st.sampled_from([0.01, 0.3, 0.9]),
        st.integers(0, 9),
    )
    def property_(texts, length, block, val_fraction, seed):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        rows = [{"text": f"{i % 4} is the number of this text: {text}"} for i, text in enumerate(texts)]
        (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        corpus = corpus_of(folder / "text.jsonl", tokenizer=str(tokenizer_folder), val_fraction=val_fraction)
        tokens = prepare(corpus, folder, length)
        head = prepare(Corpus(**{**vars(corpus), "streamed": True}), folder, length)
        assert head.test.read(0, len(head.test)).tolist() == tokens.test.read(0, len(tokens.test)).tolist()
        prepared = TokenDataset(tokens.train, length)
        tokenizer, threshold = load_tokenizer(str(tokenizer_folder)), head.facts["threshold"]
        whole, blocks = (
            StreamingDataset(corpus, tokenizer, threshold, length, seed, block_tokens)
            for block_tokens in (1 << 20, block * length)
        )
        shuffled = ShuffledDataset(prepared, seed)
        assert whole.take(0, 2 * len(shuffled)).tolist() == shuffled.take(0, 2 * len(shuffled)).tolist()
        for first in range(0, 2 * len(prepared), len(prepared)):
            for start in range(0, len(prepared), block):
                indices = np.arange(start, min(start + block, len(prepared)))
                streamed = blocks.take(first + start, len(indices)).tolist()
                assert sorted(streamed) == sorted(prepared.batch(indices).tolist())
        whole.close()
        blocks.close()


@pytest.mark.parametrize("examples", [6, SLOW(40)])
def test_interrupted_streams_on_any_ranks_yield_the_batches_of_one_rank(examples, tokenizer_folder, tmp_path):
    @holds_for(examples, st.integers(2, 30), st.integers(1, 6), st.integers(1, 60), INTERRUPTIONS)
    def property_(documents, length, block, interruptions):
        text = Path(tempfile.mkdtemp(dir=tmp_path)) / "text.jsonl"
        write_lines(text, documents, duplicates=0)
        corpus = corpus_of(text, tokenizer=str(tokenizer_folder))
        tokenizer = load_tokenizer(str(tokenizer_folder))

        def sequences() -> StreamingDataset:
            return StreamingDataset(corpus, tokenizer, 0.0, length, seed=3, block_tokens=block * length)

        assert global_batches(sequences, 12, interruptions) == global_batches(sequences, 12)


def damage(file: Path, data: st.DataObject) -> None:
    """Change one byte of a file, or remove its end."""
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)


def contents(tokens: Tokens) -> list[list[int]]:
    return [array.read(0, len(array)).tolist() for array in (tokens.train, tokens.test)]


@pytest.mark.parametrize("examples", [100, SLOW(800)])
def test_any_damage_of_prepared_tokens_is_reported(examples, tokenizer_folder, tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", 40, duplicates=0)
    reference = prepare(corpus_of(lines, tokenizer=str(tokenizer_folder)), tmp_path / "cache", 16, part_tokens=600)
    names = sorted(path.name for path in reference.folder.iterdir())
    assert len(names) > 8
    folder = tmp_path / "damaged"

    @holds_for(examples, st.data())
    def property_(data):
        shutil.copytree(reference.folder, folder, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(names))
        damage(folder / name, data)
        try:
            facts = open_tokens(folder).facts
        except UserError as error:
            assert f"the prepared tokens in {folder} are damaged (" in str(error) and "\n" not in str(error)
        else:  # a changed space between the facts
            assert name == "tokens.json" and facts == reference.facts


@pytest.mark.parametrize("examples", [25, SLOW(150)])
def test_any_damage_of_an_interrupted_preparation_is_reported(examples, tokenizer_folder, tmp_path, monkeypatch):
    """The files of its parts and its journal; files that are written again may be damaged."""
    lines = write_lines(tmp_path / "lines.jsonl", 60, duplicates=10)
    corpus = corpus_of(lines, tokenizer=str(tokenizer_folder), deduplicate=True)
    expected = contents(prepare(corpus, tmp_path / "whole", 16, part_tokens=600))
    write_part, parts = sys.modules["data.prepare"].write_part, itertools.count()

    def write_two_parts(*arguments):
        if next(parts) == 2:
            raise KeyboardInterrupt
        return write_part(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["data.prepare"], "write_part", write_two_parts)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "cache", 16, part_tokens=600)
    (interrupted,) = (tmp_path / "cache").glob("tokens-*")
    journal = json.loads((interrupted / "journal.json").read_text())
    names = [*journal["files"], "journal.json"]
    assert len(journal["parts"]) == 2 and len(names) > 4

    @holds_for(examples, st.data())
    def property_(data):
        cache = Path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copytree(interrupted, cache / interrupted.name)
        damage(cache / interrupted.name / data.draw(st.sampled_from(names)), data)
        try:
            tokens = prepare(corpus, cache, 16, part_tokens=600)
        except UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
        else:
            assert contents(tokens) == expected
