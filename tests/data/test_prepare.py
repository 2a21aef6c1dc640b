"""Tokens are prepared once, by one process at a time; interrupted preparations resume, and damage is reported."""

import json
import lzma
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import BatchShare, Corpus, Mixture, ShuffledDataset, Source, TokenDataset, TrainLoader, open_tokens, prepare
from data.tokenizer import load_tokenizer
from data.tokens import DOCUMENT_DTYPE
from tests.helpers import CHECKOUT


def corpus_of(path: Path, **settings) -> Corpus:
    return Corpus((Source(name="text", path=str(path)),), **{"vocab_size": 300, "val_fraction": 0.2, **settings})


@pytest.fixture(scope="module")
def lines(tmp_path_factory, corpus) -> Path:
    """A file of 2,000 short documents, of which 100 are duplicates."""
    file = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    words = " ".join(p.read_text() for p in sorted(corpus.glob("*.txt"))).split()
    rng = random.Random(0)
    texts = [" ".join(words[i : i + rng.randint(5, 60)]) for i in rng.sample(range(len(words) - 60), 1900)]
    texts += texts[:100]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def contents(tokens) -> dict[str, np.ndarray]:
    return {split: getattr(tokens, split).read(0, len(getattr(tokens, split))) for split in ("train", "test")}


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(contents(one).values(), contents(other).values(), strict=True))


def test_tokens_are_prepared_once_and_cached(corpus, tmp_path, capsys):
    from rich.console import Console

    console = Console(force_terminal=False)
    first = prepare(corpus_of(corpus), tmp_path, 16, console)
    assert "training a byte-level BPE of 300 tokens" in capsys.readouterr().out
    again = prepare(corpus_of(corpus), tmp_path, 16, console)
    assert capsys.readouterr().out == ""
    assert again.fingerprint == first.fingerprint and same(first, again) and first.train.dtype == np.uint16
    assert [p.name for p in tmp_path.glob("[!.]*")] == [first.folder.name]
    assert not list(first.folder.glob(".saving-*")) and not (first.folder / "journal.json").exists()
    other = prepare(corpus_of(corpus, vocab_size=301), tmp_path, 16)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("part_tokens", [300, 20_000, 1 << 26])
def test_every_document_is_complete_for_any_part_size(lines, part_tokens, tmp_path):
    tokens = prepare(corpus_of(lines), tmp_path, 16, part_tokens=part_tokens)
    tokenizer = load_tokenizer(str(tokens.folder))
    texts = {split: [] for split in ("train", "test")}
    for document in Mixture([Source(name="text", path=str(lines))]):
        texts["test" if document.hash_fraction < 0.2 else "train"].append(document.text)
    for split, expected in texts.items():
        array, facts = getattr(tokens, split), tokens.facts[split]
        ids = array.read(0, len(array))
        ends = np.flatnonzero(ids == tokenizer.end) + 1
        decoded = [tokenizer.tokenizer.decode(piece[:-1].tolist()) for piece in np.split(ids, ends)[:-1]]
        assert decoded == expected
        index = [np.load(tokens.folder / p["file"].replace(".npy", ".documents.npy")) for p in facts["parts"]]
        assert all(part.dtype == DOCUMENT_DTYPE for part in index)
        document_ends = np.concatenate(
            [part["end"] + start for part, start in zip(index, array.starts[:-1], strict=True)]
        )
        assert document_ends.tolist() == ends.tolist()
        assert facts["documents"] == len(expected) and facts["tokens"] == len(ids)
        assert facts["bytes"] == sum(len(text.encode()) for text in expected)
        sequences = TokenDataset(array, 50)
        numbers = np.cumsum(np.concatenate([[0], ids == tokenizer.end]))  # of the document at each position
        for i in range(len(sequences)):
            row = numbers[i * 50 : (i + 1) * 50]
            assert sequences.documents(np.array([i]))[0].tolist() == (row - row[0]).tolist()
    assert (len(tokens.facts["train"]["parts"]) > 1) == (part_tokens < 1 << 26)


PREPARE = """
import sys
from pathlib import Path
from rich.console import Console
from data import Corpus, Source, prepare
corpus = Corpus((Source(name="text", path=sys.argv[1]),), vocab_size=300, val_fraction=0.2, deduplicate=True)
prepare(corpus, Path(sys.argv[2]), 16, Console(force_terminal=False), part_tokens=int(sys.argv[3]))
"""


def start_preparation(path: Path, cache: Path, part_tokens: int = 2000, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + PREPARE, str(path), str(cache), str(part_tokens)]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_preparations_end_with_the_same_tokens(lines, tmp_path):
    reference = prepare(corpus_of(lines, deduplicate=True), tmp_path / "reference", 16, part_tokens=2000)
    assert reference.facts["duplicates"] == 100 and len(reference.facts["train"]["parts"]) > 10
    rng, continued = random.Random(0), 0
    for _ in range(12):
        process = start_preparation(lines, tmp_path / "killed")
        before = time.time()
        while process.poll() is None:  # at a random part after the existing ones
            journal = next(tmp_path.glob("killed/tokens-*/journal.json"), None)
            if journal is not None and journal.stat().st_mtime > before and rng.random() < 0.2:
                process.kill()
            time.sleep(0.002)
        out, err = process.communicate()
        continued += "continuing" in out
        if process.returncode == 0:
            break
        assert process.returncode == -9, err
    tokens = prepare(corpus_of(lines, deduplicate=True), tmp_path / "killed", 16, part_tokens=2000)
    assert continued >= 2
    assert tokens.fingerprint == reference.fingerprint and same(tokens, reference)
    assert {**tokens.facts, "cache_key": None} == {**reference.facts, "cache_key": None}


def test_preparation_stopped_after_every_part_has_the_same_tokens(lines, corpus, tmp_path, monkeypatch):
    """Some sources have no document in some parts."""
    rare = tmp_path / "rare.jsonl"
    rare.write_text("".join(json.dumps({"text": f"rare document {i} " * 5}) + "\n" for i in range(100)))
    sources = (Source(name="lines", path=str(lines), weight=200), Source(name="rare", path=str(rare)))
    settings = Corpus(sources, vocab_size=300, val_fraction=0.2)
    reference = prepare(settings, tmp_path / "reference", 16, part_tokens=3000)
    module, stops = sys.modules["data.prepare"], 0
    write, write_atomic, stopping = module.write_part, module.write_atomic, [False]

    def write_and_stop(*arguments):
        stopping[0] = True
        return write(*arguments)

    def write_atomic_and_stop(path, text):
        write_atomic(path, text)
        if stopping[0] and path.name == "journal.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_part", write_and_stop)
    monkeypatch.setattr(module, "write_atomic", write_atomic_and_stop)
    while not list((tmp_path / "pieces").glob("*/tokens.json")):
        stopping[0] = False
        try:
            pieces = prepare(settings, tmp_path / "pieces", 16, part_tokens=3000)
        except KeyboardInterrupt:
            stops += 1
    assert stops > 10 and pieces.fingerprint == reference.fingerprint and same(reference, pieces)


def test_concurrent_processes_prepare_once(lines, tmp_path):
    processes = [start_preparation(lines, tmp_path) for _ in range(3)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    outputs = [out for out, _ in results]
    assert sum("training a byte-level BPE" in out for out in outputs) == 1
    assert sum("waiting for another process" in out or out == "" for out in outputs) == 2


def test_full_disk_is_one_sentence_and_preparation_resumes(lines, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
    first = start_preparation(lines, tmp_path)
    while first.poll() is None and not list(tmp_path.glob("tokens-*/train-00003.npy")):
        time.sleep(0.002)
    first.kill()
    first.communicate()
    full = start_preparation(lines, tmp_path, before=limit)
    _, err = full.communicate()
    assert full.returncode == 1
    assert "cannot be written (File too large): complete parts are kept, and the same command continues" in err
    tokens = prepare(corpus_of(lines, deduplicate=True), tmp_path, 16, part_tokens=2000)
    assert same(tokens, prepare(corpus_of(lines, deduplicate=True), tmp_path / "other", 16, part_tokens=2000))


def test_truncated_file_is_named(lines, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(lines, folder / "a.jsonl")
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(lines.read_bytes())[:3000])
    with pytest.raises(ValueError, match=r"sources\.text\.path=\S+ cannot be read: \S+/b\.jsonl\.xz: .*ended before"):
        prepare(corpus_of(folder), tmp_path / "cache", 16)


def test_damaged_file_is_named(lines, tmp_path):
    reference = prepare(corpus_of(lines), tmp_path / "cache", 16, part_tokens=100_000)
    assert len(reference.facts["train"]["parts"]) > 1
    assert reference.facts["files"].keys() == {p.name for p in reference.folder.iterdir()} - {"tokens.json"}
    for name in reference.facts["files"]:
        for damage in ("flip", "cut", "remove"):
            folder = tmp_path / "damaged"
            shutil.copytree(reference.folder, folder)
            file = folder / name
            content = bytearray(file.read_bytes())
            if damage == "remove":
                file.unlink()
            else:
                content[len(content) // 2] ^= 1
                file.write_bytes(content if damage == "flip" else content[:-1])
            with pytest.raises(ValueError, match=rf"damaged \(.*{name}.*\): remove that folder"):
                open_tokens(folder)
            shutil.rmtree(folder)
    manifest = (reference.folder / "tokens.json").read_text()
    for changed in (
        manifest.replace('"tokens": ', '"tokens": 1', 1),
        manifest.replace('"fingerprint"', '"fingerprin"'),
    ):
        assert changed != manifest
        (reference.folder / "tokens.json").write_text(changed)
        with pytest.raises(ValueError, match=r"damaged .*checksum it was written with"):
            open_tokens(reference.folder)
    (reference.folder / "tokens.json").write_text('{"half')
    with pytest.raises(ValueError, match="damaged"):
        prepare(corpus_of(lines), tmp_path / "cache", 16)


def test_max_tokens_ends_the_text_with_a_complete_document(lines, tmp_path):
    reference = prepare(corpus_of(lines), tmp_path, 16)
    for part_tokens in (1000, 1 << 26):
        short = prepare(corpus_of(lines, max_tokens=5000), tmp_path / str(part_tokens), 16, part_tokens=part_tokens)
        assert 5000 <= len(short.train) < 5500
        assert short.train.read(0, 5000).tolist() == reference.train.read(0, 5000).tolist()


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, 1), (1 - 1e-9, 2)])
def test_tiny_corpus_keeps_a_document_in_each_split(fraction, held_out, tmp_path):
    texts = [f"this is text {i}, which is short" for i in range(3)]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    tokens = prepare(corpus_of(tmp_path / "text", val_fraction=fraction), tmp_path / "cache", 4)
    assert (tokens.facts["test"]["documents"], tokens.facts["train"]["documents"]) == (held_out, 3 - held_out)
    documents = sorted(
        Mixture([Source(name="s", path=str(tmp_path / "text"))]), key=lambda document: document.hash_fraction
    )
    tokenizer = load_tokenizer(str(tokens.folder))
    held_out_text = tokenizer.tokenizer.decode(tokens.test.read(0, len(tokens.test)).tolist())
    assert all((document.text in held_out_text) == (i < held_out) for i, document in enumerate(documents))
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("the same")
    with pytest.raises(ValueError, match="all the same text"):
        prepare(corpus_of(tmp_path / "text"), tmp_path / "cache", 4)
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1


def test_batches_number_the_documents_of_their_tokens(lines, tmp_path):
    tokens = prepare(corpus_of(lines), tmp_path, 16, part_tokens=3000)
    end = tokens.facts["end_of_text"]
    sequences = ShuffledDataset(TokenDataset(tokens.train, 64), seed=0)
    loader = TrainLoader(sequences, tokens.fingerprint, 3, BatchShare(8, 4), documents=True)
    for batch in loader:
        ended = torch.cumsum(batch.tokens[:, :-1].long() == end, dim=1)
        assert batch.documents[:, 1:].tolist() == ended[:, :-1].tolist()
        assert not batch.documents[:, 0].any() and batch.documents.max() > 0


def test_existing_tokenizer_is_used(lines, tmp_path):
    first = prepare(corpus_of(lines), tmp_path / "a", 16)
    second = prepare(corpus_of(lines, tokenizer=str(first.folder)), tmp_path / "b", 16)
    assert same(first, second) and second.fingerprint == first.fingerprint


def test_text_shorter_than_a_sequence_is_rejected(lines, tmp_path):
    with pytest.raises(ValueError, match=r"sequence_length=10000000 is longer than the text: the text has .* bytes"):
        corpus_of(lines).check(tmp_path, 10_000_000)
    with pytest.raises(
        ValueError, match=r"sequence_length=100000 is longer than the text: the test text has \S+ tokens"
    ):
        prepare(corpus_of(lines), tmp_path, 100_000)


def test_damaged_journal_is_reported(lines, tmp_path, monkeypatch):
    module = sys.modules["data.prepare"]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus_of(lines), tmp_path, 16)
    (journal,) = tmp_path.glob("*/journal.json")
    journal.write_text(journal.read_text().replace('"complete": false', '"complete": true'))
    with pytest.raises(ValueError, match=r"journal.json is damaged \(.*\): remove the folder"):
        prepare(corpus_of(lines), tmp_path, 16)


@pytest.mark.parametrize(
    ("texts", "limit", "message"),
    [
        (["some words " * 50, "more words"], 10, "max_tokens=10 is not allowed: the first document reaches it"),
        (["some words"], None, "the text is one document"),
        (["some words", "some words"], 1000, "the documents are all the same text"),
    ],
)
def test_too_few_documents_are_rejected(texts, limit, message, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(name="s", path=str(tmp_path / "text.jsonl"))
    with pytest.raises(ValueError, match=message):
        prepare(Corpus((source,), vocab_size=300, max_tokens=limit), tmp_path / "cache", 4)
