"""A corpus: its folder in the cache, its size, the text that trains its tokenizer, and checks before it is prepared."""

import itertools
import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from common.errors import ConfigError
from data import Corpus, Source, SourceError, corpus_tokenizer, prepare
from data.sources import Document
from tests.data.preparation import corpus_of, write_lines

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl", 40)


def hash_fraction(text: str) -> float:
    return Document(text, sha256(text.encode()).digest(), len(text)).hash_fraction


def test_tokens_have_another_folder_for_each_setting_that_they_depend_on(lines, tmp_path, monkeypatch):
    corpora = [
        corpus_of(lines),
        corpus_of(lines, vocab_size=301),
        corpus_of(lines, val_fraction=0.3),
        corpus_of(lines, deduplicate=True),
        corpus_of(lines, max_tokens=5000),
        corpus_of(lines, streamed=True),
        Corpus((Source(name="text", path=str(lines), column="body"),), vocab_size=300, val_fraction=0.2),
        Corpus((Source(name="text", path=str(lines), weight=2),), vocab_size=300, val_fraction=0.2),
        Corpus((Source(name="text", sotu=True),), vocab_size=300, val_fraction=0.2),
    ]
    folders = {corpus.folder(tmp_path) for corpus in corpora}
    assert len(folders) == len(corpora) and corpus_of(lines).folder(tmp_path) in folders
    monkeypatch.setattr("data.corpus.version", lambda package: f"another version of {package}")
    assert corpus_of(lines).folder(tmp_path) not in folders


def test_epoch_ends_with_the_source_that_ends_first(tmp_path):
    for name, characters in (("a", 600), ("b", 1000)):
        (tmp_path / f"{name}.txt").write_text("x" * characters)
    sources = [Source(name=name, path=str(tmp_path / f"{name}.txt"), weight=w) for name, w in (("a", 3), ("b", 1))]
    assert Corpus(tuple(sources)).estimated_bytes() == 800
    assert Corpus((*sources, Source(name="c", hub="somebody/text"))).estimated_bytes() is None


def test_tokenizer_is_trained_on_the_first_training_documents(tmp_path):
    """The words of held-out documents, and of those after the limit, get no tokens."""

    def documents(word: str, held_out: bool, count: int) -> list[str]:
        texts = (f"{number}" + f" {word}" * 20 for number in range(100))
        return [text for text in texts if (hash_fraction(text) < 0.5) == held_out][:count]

    first = [*documents("held", True, 5), *documents("trained", False, 5)]
    rows = [*first, *documents("late", False, 5)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    corpus = corpus_of(tmp_path / "text.jsonl", val_fraction=0.5)
    trained_bytes = sum(len(text) for text in first[5:])
    for limit, words in ((1 << 20, {"trained", "late"}), (trained_bytes, {"trained"})):
        vocabulary = corpus_tokenizer(corpus, QUIET, limit).tokenizer.get_vocab()
        assert {word for word in ("held", "trained", "late") if f"Ġ{word}" in vocabulary} == words
    assert "Ġheld" in corpus_tokenizer(corpus, QUIET, threshold=0.0).tokenizer.get_vocab()


def test_subsets_of_a_dataset_have_the_same_commit(monkeypatch):
    """Even if the dataset changes between two requests."""
    numbers = itertools.count(1)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info",
        lambda api, name, revision: SimpleNamespace(sha=f"{name} {revision} {next(numbers)}"),
    )
    sources = (
        Source(name="one", hub="somebody/text", subset="one"),
        Source(name="two", hub="somebody/text", subset="two"),
        Source(name="old", hub="somebody/text", revision="old"),
        Source(name="files", path="text"),
    )
    found = Corpus(sources).commits()
    latest = "somebody/text None 1"
    assert found == {"one": latest, "two": latest, "old": "somebody/text old 2"}
    revisions = {source.name: source.revision for source in Corpus(sources).pinned_to(found).sources}
    assert revisions == {**found, "files": None}


def test_prepared_corpus_is_checked_without_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    corpus = Corpus((Source(name="s", hub="somebody/text"),))
    with pytest.raises(SourceError, match=r"^sources\.s\.hub=somebody/text cannot be opened"):
        corpus.check(tmp_path, 16)
    corpus.folder(tmp_path).mkdir()
    (corpus.folder(tmp_path) / "tokens.json").touch()
    corpus.check(tmp_path, 16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": " "}'] * 20, r"^sources\.text\.path=\S+ holds no text$"),
        (['{"text": "%s"}' % ("words " * 9)], r"^sources\.text\.path=\S+ is one document: another is needed"),
    ],
)  # fmt: skip
def test_text_of_fewer_than_two_documents_is_rejected_beforehand(rows, message, tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    with pytest.raises(SourceError, match=message):
        corpus_of(tmp_path / "text.jsonl").check(tmp_path / "cache", 16)


def test_vocabulary_that_is_trained_has_all_bytes_and_the_end_of_text(lines, tmp_path):
    corpus_of(lines, vocab_size=257).check(tmp_path, 16)
    with pytest.raises(ConfigError, match=r"^vocab_size=256 is not allowed: it must be at least 257, all bytes and"):
        corpus_of(lines, vocab_size=256).check(tmp_path, 16)


def test_longest_sequence_has_a_token_less_than_the_text(lines, tmp_path):
    size = lines.stat().st_size
    corpus_of(lines).check(tmp_path, size - 1)
    with pytest.raises(SourceError, match=rf"^sequence_length={size} is longer than the text: the text has"):
        corpus_of(lines).check(tmp_path, size)
    tokens = prepare(corpus_of(lines), tmp_path, 16)
    shortest = min(len(tokens.train), len(tokens.test))
    prepare(corpus_of(lines), tmp_path, shortest - 1)
    with pytest.raises(SourceError, match=rf"^sequence_length={shortest} is longer than the text: the test text has"):
        prepare(corpus_of(lines), tmp_path, shortest)
