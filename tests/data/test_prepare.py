"""Tokens are prepared whole, once, from where it stopped, by one process at a time, and damage is named."""

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

from data import Corpus, Mixture, ShuffledDataset, Source, TokenDataset, TrainLoader, open_tokens, prepare
from data.tokenizer import load_tokenizer
from data.tokens import DOCUMENT
from tests.conftest import CHECKOUT


def corpus_of(path: Path, **settings) -> Corpus:
    return Corpus((Source(name="text", path=str(path)),), **{"vocab_size": 300, "val_fraction": 0.2, **settings})


@pytest.fixture(scope="module")
def lines(tmp_path_factory, corpus) -> Path:
    """A file of 2,000 short documents, some of them alike."""
    file = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    words = " ".join(p.read_text() for p in sorted(corpus.glob("*.txt"))).split()
    draw = random.Random(0)
    texts = [" ".join(words[i : i + draw.randint(5, 60)]) for i in draw.sample(range(len(words) - 60), 1900)]
    texts += texts[:100]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def contents(tokens) -> dict[str, np.ndarray]:
    return {split: getattr(tokens, split).read(0, len(getattr(tokens, split))) for split in ("train", "test")}


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(contents(one).values(), contents(other).values(), strict=True))


def test_tokens_are_prepared_once_and_say_what_they_are(corpus, tmp_path, capsys):
    from rich.console import Console

    console = Console(force_terminal=False)
    first = prepare(corpus_of(corpus), tmp_path, 16, console)
    assert "training a byte-level BPE of 300 tokens" in capsys.readouterr().out
    again = prepare(corpus_of(corpus), tmp_path, 16, console)
    assert capsys.readouterr().out == ""
    assert again.fingerprint == first.fingerprint and same(first, again) and first.train.dtype == np.uint16
    assert [p.name for p in tmp_path.glob("[!.]*")] == [first.folder.name]
    assert not list(first.folder.glob("*.tmp")) and not (first.folder / "journal.json").exists()
    other = prepare(corpus_of(corpus, vocab_size=301), tmp_path, 16)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("part_tokens", [300, 20_000, 1 << 26])
def test_every_document_is_there_whole_wherever_parts_end(lines, part_tokens, tmp_path):
    tokens = prepare(corpus_of(lines), tmp_path, 16, part_tokens=part_tokens)
    encoder = load_tokenizer(str(tokens.folder))
    texts = {split: [] for split in ("train", "test")}
    for document in Mixture([Source(name="text", path=str(lines))]):
        texts["test" if document.draw < 0.2 else "train"].append(document.text)
    for split, wanted in texts.items():
        array, facts = getattr(tokens, split), tokens.facts[split]
        ids = array.read(0, len(array))
        ends = np.flatnonzero(ids == encoder.end) + 1
        found = [encoder.tokenizer.decode(piece[:-1].tolist()) for piece in np.split(ids, ends)[:-1]]
        assert found == wanted
        index = [np.load(tokens.folder / p["file"].replace(".npy", ".documents.npy")) for p in facts["parts"]]
        assert all(part.dtype == DOCUMENT for part in index)
        places = np.concatenate([part["end"] + start for part, start in zip(index, array.starts[:-1], strict=True)])
        assert places.tolist() == ends.tolist()
        assert facts["documents"] == len(wanted) and facts["tokens"] == len(ids)
        assert facts["bytes"] == sum(len(text.encode()) for text in wanted)
        sequences = TokenDataset(array, 50)
        numbers = np.cumsum(np.concatenate([[0], ids == encoder.end]))  # of the document at each place
        for i in range(len(sequences)):
            mine = numbers[i * 50 : (i + 1) * 50]
            assert sequences.documents(np.array([i]))[0].tolist() == (mine - mine[0]).tolist()
    assert (len(tokens.facts["train"]["parts"]) > 1) == (part_tokens < 1 << 26)


PREPARE = """
import sys
from pathlib import Path
from rich.console import Console
from data import Corpus, Source, prepare
corpus = Corpus((Source(name="text", path=sys.argv[1]),), vocab_size=300, val_fraction=0.2, deduplicate=True)
prepare(corpus, Path(sys.argv[2]), 16, Console(force_terminal=False), part_tokens=int(sys.argv[3]))
"""


def start(path: Path, cache: Path, part_tokens: int = 2000, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + PREPARE, str(path), str(cache), str(part_tokens)]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_again_and_again_it_ends_as_if_it_never_was(lines, tmp_path):
    whole = prepare(corpus_of(lines, deduplicate=True), tmp_path / "whole", 16, part_tokens=2000)
    assert whole.facts["duplicates"] == 100 and len(whole.facts["train"]["parts"]) > 10
    draw, continued = random.Random(0), 0
    for _ in range(12):
        process = start(lines, tmp_path / "killed")
        before = time.time()
        while process.poll() is None:  # a random part after the ones already there
            journal = next(tmp_path.glob("killed/tokens-*/journal.json"), None)
            if journal is not None and journal.stat().st_mtime > before and draw.random() < 0.2:
                process.kill()
            time.sleep(0.002)
        out, err = process.communicate()
        continued += "continuing" in out
        if process.returncode == 0:
            break
        assert process.returncode == -9, err
    tokens = prepare(corpus_of(lines, deduplicate=True), tmp_path / "killed", 16, part_tokens=2000)
    assert continued >= 2
    assert tokens.fingerprint == whole.fingerprint and same(tokens, whole)
    assert {k: v for k, v in tokens.facts.items() if k != "recipe"} == {
        k: v for k, v in whole.facts.items() if k != "recipe"
    }


def test_continued_after_each_part_it_ends_as_if_in_one_go(lines, corpus, tmp_path, monkeypatch):
    """With sources of which some give nothing to a part: stopped after every part, and continued."""
    rare = tmp_path / "rare.jsonl"
    rare.write_text("".join(json.dumps({"text": f"rare document {i} " * 5}) + "\n" for i in range(100)))
    sources = (Source(name="lines", path=str(lines), weight=200), Source(name="rare", path=str(rare)))
    settings = Corpus(sources, vocab_size=300, val_fraction=0.2)
    whole = prepare(settings, tmp_path / "whole", 16, part_tokens=3000)
    room, stops = sys.modules["data.prepare"], 0
    write, replace, stopping = room.write_part, room.replace, [False]

    def write_and_stop(*arguments):
        stopping[0] = True
        return write(*arguments)

    def replace_and_stop(path, text):
        replace(path, text)
        if stopping[0] and path.name == "journal.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(room, "write_part", write_and_stop)
    monkeypatch.setattr(room, "replace", replace_and_stop)
    while not list((tmp_path / "pieces").glob("*/tokens.json")):
        stopping[0] = False
        try:
            pieces = prepare(settings, tmp_path / "pieces", 16, part_tokens=3000)
        except KeyboardInterrupt:
            stops += 1
    assert stops > 10 and pieces.fingerprint == whole.fingerprint and same(whole, pieces)


def test_two_processes_at_once_prepare_it_once(lines, tmp_path):
    processes = [start(lines, tmp_path) for _ in range(3)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    said = [out for out, _ in results]
    assert sum("training a byte-level BPE" in out for out in said) == 1
    assert sum("waiting for another process" in out or out == "" for out in said) == 2


def test_a_full_disk_is_one_sentence_and_it_goes_on_when_there_is_room(lines, tmp_path):
    """A limit on the size of files stands for the full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
    first = start(lines, tmp_path)
    while first.poll() is None and not list(tmp_path.glob("tokens-*/train-00003.npy")):
        time.sleep(0.002)
    first.kill()
    first.communicate()
    full = start(lines, tmp_path, before=limit)
    _, err = full.communicate()
    assert full.returncode == 1
    assert "cannot be written (File too large): what is whole is kept, and the same command continues" in err
    tokens = prepare(corpus_of(lines, deduplicate=True), tmp_path, 16, part_tokens=2000)
    assert same(tokens, prepare(corpus_of(lines, deduplicate=True), tmp_path / "other", 16, part_tokens=2000))


def test_a_file_that_breaks_off_leaves_the_parts_before_it(lines, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(lines, folder / "a.jsonl")
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(lines.read_bytes())[:3000])
    with pytest.raises(ValueError, match=r"sources\.text\.path=\S+ cannot be read: \S+/b\.jsonl\.xz: .*ended before"):
        prepare(corpus_of(folder), tmp_path / "cache", 16)


def test_damage_is_named(lines, tmp_path):
    whole = prepare(corpus_of(lines), tmp_path / "cache", 16, part_tokens=100_000)
    assert len(whole.facts["train"]["parts"]) > 1
    assert whole.facts["files"].keys() == {p.name for p in whole.folder.iterdir()} - {"tokens.json"}
    for name in whole.facts["files"]:
        for damage in ("flip", "cut", "remove"):
            folder = tmp_path / "damaged"
            shutil.copytree(whole.folder, folder)
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
    manifest = (whole.folder / "tokens.json").read_text()
    for changed in (
        manifest.replace('"tokens": ', '"tokens": 1', 1),
        manifest.replace('"fingerprint"', '"fingerprin"'),
    ):
        assert changed != manifest
        (whole.folder / "tokens.json").write_text(changed)
        with pytest.raises(ValueError, match=r"damaged .*checksum it was written with"):
            open_tokens(whole.folder)
    (whole.folder / "tokens.json").write_text('{"half')
    with pytest.raises(ValueError, match="damaged"):
        prepare(corpus_of(lines), tmp_path / "cache", 16)


def test_it_ends_with_the_document_that_reaches_the_limit(lines, tmp_path):
    whole = prepare(corpus_of(lines), tmp_path, 16)
    for part_tokens in (1000, 1 << 26):
        short = prepare(corpus_of(lines, max_tokens=5000), tmp_path / str(part_tokens), 16, part_tokens=part_tokens)
        assert 5000 <= len(short.train) < 5500
        assert short.train.read(0, 5000).tolist() == whole.train.read(0, 5000).tolist()


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, 1), (1 - 1e-9, 2)])
def test_of_few_documents_one_is_on_either_side(fraction, held_out, tmp_path):
    texts = [f"this is text {i}, which is short" for i in range(3)]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    tokens = prepare(corpus_of(tmp_path / "text", val_fraction=fraction), tmp_path / "cache", 4)
    assert (tokens.facts["test"]["documents"], tokens.facts["train"]["documents"]) == (held_out, 3 - held_out)
    documents = sorted(Mixture([Source(name="s", path=str(tmp_path / "text"))]), key=lambda document: document.draw)
    encoder = load_tokenizer(str(tokens.folder))
    found = encoder.tokenizer.decode(tokens.test.read(0, len(tokens.test)).tolist())
    assert all((document.text in found) == (i < held_out) for i, document in enumerate(documents))
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("the same")
    with pytest.raises(ValueError, match="all the same text"):
        prepare(corpus_of(tmp_path / "text"), tmp_path / "cache", 4)
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1


def test_documents_travel_with_the_tokens(lines, tmp_path):
    tokens = prepare(corpus_of(lines), tmp_path, 16, part_tokens=3000)
    end = tokens.facts["end_of_text"]
    sequences = ShuffledDataset(TokenDataset(tokens.train, 64), seed=0)
    loader = TrainLoader(sequences, tokens.fingerprint, 3, 8, 4, documents=True)
    for batch in loader:
        ended = torch.cumsum(batch.tokens[:, :-1].long() == end, dim=1)
        assert batch.documents[:, 1:].tolist() == ended[:, :-1].tolist()
        assert not batch.documents[:, 0].any() and batch.documents.max() > 0


def test_a_given_tokenizer_is_used(lines, tmp_path):
    first = prepare(corpus_of(lines), tmp_path / "a", 16)
    given = prepare(corpus_of(lines, tokenizer=str(first.folder)), tmp_path / "b", 16)
    assert same(first, given) and given.fingerprint == first.fingerprint


def test_a_text_shorter_than_a_sequence_is_refused(lines, tmp_path):
    with pytest.raises(ValueError, match=r"sequence_length=10000000 is longer than the text: the text has .* bytes"):
        corpus_of(lines).check(tmp_path, 10_000_000)
    with pytest.raises(
        ValueError, match=r"sequence_length=100000 is longer than the text: the test text has \S+ tokens"
    ):
        prepare(corpus_of(lines), tmp_path, 100_000)


def test_a_damaged_journal_is_told(lines, tmp_path, monkeypatch):
    room = sys.modules["data.prepare"]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus_of(lines), tmp_path, 16)
    (journal,) = tmp_path.glob("*/journal.json")
    journal.write_text(journal.read_text().replace('"complete": false', '"complete": true'))
    with pytest.raises(ValueError, match=r"journal.json is damaged \(.*\): remove the folder"):
        prepare(corpus_of(lines), tmp_path, 16)


@pytest.mark.parametrize(
    ("texts", "limit", "said"),
    [
        (["some words " * 50, "more words"], 10, "max_tokens=10 is not allowed: the first document reaches it"),
        (["some words"], None, "the text is one document"),
        (["some words", "some words"], 1000, "the documents are all the same text"),
    ],
)
def test_too_few_documents_are_told(texts, limit, said, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(name="s", path=str(tmp_path / "text.jsonl"))
    with pytest.raises(ValueError, match=said):
        prepare(Corpus((source,), vocab_size=300, max_tokens=limit), tmp_path / "cache", 4)
