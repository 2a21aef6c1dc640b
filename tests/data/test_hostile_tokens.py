"""A folder of tokens, a journal or a position from somebody else is read right or refused with one sentence."""

import copy
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from common.errors import UserError
from data import BatchShare, Corpus, ShuffledDataset, StreamingDataset, TokenDataset, TrainLoader, open_tokens, prepare
from data.tokenizer import END_OF_TEXT, TOKENIZER_FILES, read_tokenizer, train_tokenizer
from data.tokens import DOCUMENT_DTYPE, dump_with_checksum
from data.writing import file_facts
from tests.data.preparation import PART_TOKENS, corpus_of, write_lines

#: Values that take the place of any other.
HOSTILE = (
    None, True, -1, 0, 1 << 70, 0.5, float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd", "train-00000.npy",
    "a\0b", "\ud800", [], [[]], {}, {"x": 1}, [1], "9" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(corpus_of(write_lines(folder / "lines.jsonl")), folder / "cache", 16, part_tokens=3000).folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """A folder of tokens that the test may change."""
    return shutil.copytree(prepared, tmp_path / "tokens")


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    """Change what a file says, and give it the checksum of that."""
    facts = json.loads(file.read_text())
    del facts["checksum"]
    change(facts)
    file.write_text(dump_with_checksum(facts))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return container and key of all that is in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def mangle(value: Any, rng: random.Random) -> None:
    container, key = rng.choice(places(value))
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))


def is_one_sentence(error: pytest.ExceptionInfo) -> bool:
    text = str(error.value)
    return "\n" not in text and len(text) < 1000 and text.isprintable()


CHANGES = {
    "vocab_size=10 ids": lambda facts: facts.update(vocab_size=10, end_of_text=10),
    "do not fit dtype=uint16": lambda facts: facts.update(vocab_size=70_000),
    "dtype=": lambda facts: facts.update(dtype="object"),
    "end_of_text=-1": lambda facts: facts.update(end_of_text=-1),
    "parts do not have": lambda facts: facts["train"]["parts"].pop(),
    "train.parts.0.tokens=-": lambda facts: facts["train"]["parts"][0].update(tokens=-5),
    "train.parts.0.file=": lambda facts: facts["train"]["parts"][0].update(file="../train-00000.npy"),
    "is not a file of the train split": lambda facts: facts["train"]["parts"][0].update(file="test-00000.npy"),
    "files.../x": lambda facts: facts["files"].update({"../x": facts["files"]["tokenizer.json"]}),
    "files.tokenizer.json.bytes": lambda facts: facts["files"]["tokenizer.json"].update(bytes=-1),
    "cache_key.sources": lambda facts: facts["cache_key"].update(sources=[]),
    "paths": lambda facts: facts.update(paths="x"),
    "is no array of": lambda facts: facts.update(dtype="uint32"),
}  # fmt: skip


@pytest.mark.parametrize("message", CHANGES)
def test_manifest_that_does_not_fit_is_one_sentence(message, folder):
    rewrite(folder / "tokens.json", CHANGES[message])
    with pytest.raises(
        UserError, match=r"^the prepared tokens in \S+ are damaged \(.*\): remove that folder$"
    ) as error:
        open_tokens(folder)
    assert message in str(error.value) and is_one_sentence(error)


@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_manifest_is_read_or_refused(examples, folder):
    rng, original = random.Random(0), json.loads((folder / "tokens.json").read_text())
    refused = 0
    for _ in range(examples):
        facts = json.loads(json.dumps(original))
        del facts["checksum"]
        mangle(facts, rng)
        (folder / "tokens.json").write_text(dump_with_checksum(facts))
        try:
            open_tokens(folder, verify=False).held_out_bytes(1, 500)
        except UserError as error:
            assert "are damaged (" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > examples / 2


def replace(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and its checksum in the manifest."""
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    rewrite(folder / "tokens.json", lambda facts: facts["files"].update({name: file_facts(folder / name)}))


def npy(array: np.ndarray, folder: Path) -> bytes:
    np.save(folder.parent / "array.npy", array, allow_pickle=True)
    return (folder.parent / "array.npy").read_bytes()


class Opened:
    """Executes a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("opened",)


@pytest.mark.parametrize("verify", [True, False])
def test_arrays_that_do_not_fit_the_manifest_are_one_sentence(verify, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    tokens, documents = "train-00000.npy", "train-00000.documents.npy"
    ids, index = np.load(folder / tokens), np.load(folder / documents)
    shorter = index.copy()
    shorter["end"][-1] -= 1
    contents = {
        tokens: [
            npy(ids[:-1], folder), npy(ids.astype(np.int64), folder), npy(ids[None], folder), npy(ids, folder) + b"x",
            npy(ids, folder)[:-1], b"", b"\x93NUMPY\x01\x00\xff\xff{", npy(np.array([Opened()] * len(ids)), folder),
            pickle.dumps(Opened()), b"\x93NUMPY\x02\x00" + npy(ids, folder)[8:],
            npy(ids, folder).replace(b"{", b"{{", 1), npy(ids, folder).replace(b"'shape': (", b"'shape': (-", 1),
        ],
        documents: [npy(index[:-1], folder), npy(shorter, folder), npy(np.arange(len(index)), folder), b"\0" * 99],
    }  # fmt: skip
    for name, damaged in contents.items():
        kept = (folder / name).read_bytes()
        for content in damaged:
            replace(folder, name, content)
            with pytest.raises(UserError, match="are damaged") as error:
                open_tokens(folder, verify)
            assert is_one_sentence(error) and not Path("opened").exists()
        replace(folder, name, kept)
    open_tokens(folder, verify)
    index = np.load(folder / "test-00000.documents.npy")
    index["end"][0] = index["end"][1]
    replace(folder, "test-00000.documents.npy", npy(index, folder))
    with pytest.raises(UserError, match=r"test-00000\.documents\.npy has a document that ends before it begins"):
        open_tokens(folder).held_out_bytes(1, 500)
    assert index.dtype == DOCUMENT_DTYPE


@pytest.mark.parametrize("name", ["tokens.json", "train-00000.npy", "test-00000.documents.npy", "tokenizer.json"])
def test_links_out_of_the_folder_and_fifos_are_one_sentence(name, folder):
    kept = (folder / name).rename(folder.parent / "kept")
    for make in (
        lambda: (folder / name).symlink_to(kept), lambda: os.mkfifo(folder / name), lambda: (folder / name).mkdir(),
        lambda: None,
    ):  # fmt: skip
        make()
        with pytest.raises(UserError, match="are damaged") as error:
            open_tokens(folder)
        assert is_one_sentence(error)
        if (folder / name).is_dir():
            (folder / name).rmdir()
        elif os.path.lexists(folder / name):
            (folder / name).unlink()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Corpus, Path]:
    """A corpus, and the cache that holds its preparation after two parts."""
    folder = tmp_path_factory.mktemp("interrupted")
    corpus = corpus_of(write_lines(folder / "lines.jsonl", 60), deduplicate=True)
    module, parts = sys.modules["data.prepare"], []

    def write_two_parts(*arguments):
        parts.append(arguments)
        if len(parts) == 3:
            raise KeyboardInterrupt
        return write_part(*arguments)

    write_part = module.write_part
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_part", write_two_parts)
        prepare(corpus, folder / "cache", 16, part_tokens=PART_TOKENS // 2)
    return corpus, folder / "cache"


@pytest.mark.parametrize(
    "replaced", [(b"{", b"{{"), (b"NUMPY", b"numpy"), (b"'shape': (", b"'shape': (-1,"), (b"<u8", b"|O8")]
)
def test_documents_of_a_journal_that_are_none_are_one_sentence(replaced, interrupted, tmp_path):
    corpus, cache = interrupted
    copy = shutil.copytree(cache, tmp_path / "cache")
    (journal,) = copy.glob("*/journal.json")
    file = journal.with_name("train-00000.documents.npy")
    file.write_bytes(file.read_bytes().replace(*replaced, 1))
    rewrite(journal, lambda facts: facts["files"].update({file.name: file_facts(file)}))
    with pytest.raises(UserError, match=r"train-00000\.documents\.npy is damaged") as error:
        prepare(corpus, copy, 16, part_tokens=PART_TOKENS // 2)
    assert is_one_sentence(error)


@pytest.mark.parametrize("examples", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_any_journal_is_continued_or_refused(examples, interrupted, tmp_path):
    corpus, cache = interrupted
    rng = random.Random(0)
    for number in range(examples):
        copy = shutil.copytree(cache, tmp_path / str(number))
        (journal,) = copy.glob("*/journal.json")
        rewrite(journal, lambda facts: mangle(facts, rng))
        try:
            prepare(corpus, copy, 16, part_tokens=PART_TOKENS // 2)
        except UserError as error:
            assert "\n" not in str(error)
        shutil.rmtree(copy)


@pytest.mark.parametrize("mode", ["prepared", "stream"])
def test_any_position_is_continued_or_refused(mode, prepared, tmp_path):
    tokens, rng = open_tokens(prepared), random.Random(0)
    text = write_lines(tmp_path / "lines.jsonl", 60)

    def loader() -> TrainLoader:
        if mode == "prepared":
            sequences = ShuffledDataset(TokenDataset(tokens.train, 16), 1)
        else:
            sequences = StreamingDataset(corpus_of(text, streamed=True), read_tokenizer(prepared), 0.2, 16, 1, 320)
        return TrainLoader(sequences, "f", 40, BatchShare(4, 4))

    first = loader()
    for _ in zip(range(8), first, strict=False):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    first.sequences.close()
    for _ in range(150):
        changed = json.loads(json.dumps(state))
        mangle(changed, rng)
        one = loader()
        try:
            one.load_state_dict(changed)
            next(iter(one), None)
        except UserError as error:
            assert "\n" not in str(error)
        finally:
            one.sequences.close()


#: A tokenizer of each model.
BASES = {
    "bpe": lambda: train_tokenizer(["the quick brown fox "] * 20, 270).tokenizer,
    "words": lambda: tokenizers.Tokenizer(models.WordLevel({"[U]": 0, END_OF_TEXT: 1}, unk_token="[U]")),
    "unigram": lambda: tokenizers.Tokenizer(models.Unigram([("[U]", 0.0), (END_OF_TEXT, -1.0), ("a", -2.0)], unk_id=0)),
    "pieces": lambda: tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, END_OF_TEXT: 1, "a": 2}, unk_token="[UNK]")),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_tokenizer_is_used_or_refused(kind, examples, tmp_path):
    backend, rng = BASES[kind](), random.Random(0)
    backend.add_special_tokens([END_OF_TEXT])
    files = [json.loads(backend.to_str()), {"eos_token": END_OF_TEXT, "more": {"x": [1]}}]
    used = 0
    for number in range(examples):
        changed = copy.deepcopy(files)
        if number:
            mangle(changed, rng) if rng.random() < 0.1 else mangle(changed[rng.random() < 0.4], rng)
        for name, content in zip(TOKENIZER_FILES, [*changed, {}], strict=False):
            (tmp_path / name).write_text(json.dumps(content))
        try:
            tokenizer = read_tokenizer(tmp_path)
            tokenizer.encode(["a the quick fox", "日本 🎉"])
            tokenizer.save(tmp_path)
            used += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 0 < used < examples


def test_panic_of_the_tokenizers_library_is_one_sentence(tmp_path):
    """It is no `Exception` in Python."""
    backend = BASES["bpe"]()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)

    class Panicking:
        def encode_batch_fast(self, *arguments, **options):
            raise type("PanicException", (BaseException,), {})("out of range")

    with pytest.raises(
        UserError, match=r"^the tokenizer cannot encode the text \(the tokenizers library panics: out of"
    ):
        tokenizer._replace(tokenizer=Panicking()).encode(["a"])
