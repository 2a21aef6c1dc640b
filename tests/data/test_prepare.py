"""Tokens are prepared once, by one process at a time; interrupted preparations resume, and damage is reported."""

import json
import lzma
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.errors import UserError
from common.files import hold_lock
from data import Corpus, Mixture, Source, Tokens, open_tokens, prepare
from data.rows import LocalRows
from data.tokenizer import load_tokenizer
from data.tokens import DOCUMENT_DTYPE
from tests.data.arrays import token_array
from tests.data.preparation import PART_TOKENS, corpus_of, prepare_lines, write_lines
from tests.data.processes import Job
from tests.helpers import SLOW


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """A file of 300 short documents, of which 20 are duplicates."""
    return write_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl")


@pytest.fixture(scope="module")
def reference(lines, tmp_path_factory) -> Tokens:
    """Tokens that a preparation without interruption makes of the lines without duplicates."""
    cache = tmp_path_factory.mktemp("reference")
    tokens = prepare(corpus_of(lines, deduplicate=True), cache, 16, part_tokens=PART_TOKENS)
    assert tokens.facts["duplicates"] == 20 and len(tokens.facts["train"]["parts"]) > 10
    return tokens


def contents(tokens) -> dict[str, np.ndarray]:
    return {split: getattr(tokens, split).read(0, len(getattr(tokens, split))) for split in ("train", "test")}


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(contents(one).values(), contents(other).values(), strict=True))


def without_cache_key(facts: dict) -> dict:
    """Facts that do not depend on where the text lies and when it was written."""
    return {key: value for key, value in facts.items() if key != "cache_key"}


def test_tokens_are_prepared_once_and_cached(lines, tmp_path, capsys):
    console = Console(force_terminal=False)
    first = prepare(corpus_of(lines), tmp_path, 16, console)
    assert "training a byte-level BPE of 300 tokens" in capsys.readouterr().out
    again = prepare(corpus_of(lines), tmp_path, 16, console)
    assert capsys.readouterr().out == ""
    assert again.fingerprint == first.fingerprint and same(first, again) and first.train.dtype == np.uint16
    assert [p.name for p in tmp_path.glob("[!.]*")] == [first.folder.name]
    assert not list(first.folder.glob(".saving-*")) and not (first.folder / "journal.json").exists()
    other = prepare(corpus_of(lines, vocab_size=301), tmp_path, 16)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("part_tokens", [400, 5_000, 1 << 26])
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
    assert (len(tokens.facts["train"]["parts"]) > 1) == (part_tokens < 1 << 26)


def snapshots_of(preparation: Callable[[], object], cache: Path, folder: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """Return copies of the cache at the moments of a preparation that matter: what a kill there leaves.

    For each file these are: half of it written under its temporary name, all of it, and its final name.
    """
    copies: list[Path] = []
    sync = os.fsync

    def copy() -> Path:
        copies.append(shutil.copytree(cache, folder / str(len(copies))))
        return copies[-1]

    def sync_and_copy(descriptor: int) -> None:
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        copied = copy() / path.relative_to(cache)
        if path.is_file():
            with copied.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            copy()

    with patch.context() as patched:
        patched.setattr(os, "fsync", sync_and_copy)
        preparation()
    return copies


@pytest.mark.parametrize("documents", [60, SLOW(120)])
def test_preparation_killed_at_any_moment_resumes_to_the_same_tokens(documents, tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "lines.jsonl", documents, duplicates=10)
    corpus = corpus_of(lines, deduplicate=True)
    whole = prepare(corpus, tmp_path / "whole", 16, part_tokens=PART_TOKENS // 2)
    assert whole.facts["duplicates"] == 10 and len(whole.facts["train"]["parts"]) >= 3

    def preparation() -> None:
        prepare(corpus, tmp_path / "cache", 16, part_tokens=PART_TOKENS // 2)

    copies = snapshots_of(preparation, tmp_path / "cache", tmp_path / "copies", monkeypatch)
    written = len(whole.facts["files"]) + len(whole.facts["train"]["parts"]) + 2  # with journals and the manifest
    assert len(copies) >= 3 * written
    for number, cache in enumerate(copies):
        tokens = prepare(corpus, cache, 16, part_tokens=PART_TOKENS // 2)
        assert same(tokens, whole), number
        assert tokens.facts == whole.facts, number


def journal_parts(cache: Path) -> int:
    """Number of parts in the journal of the only preparation; -1 if there is none, and many after the last."""
    if list(cache.glob("tokens-*/tokens.json")):
        return 1 << 30
    journal = next(cache.glob("tokens-*/journal.json"), None)
    return -1 if journal is None else len(json.loads(journal.read_text())["parts"])


def check_finished(cache: Path, reference: Tokens) -> None:
    (folder,) = cache.glob("tokens-*")
    tokens = open_tokens(folder, verify=True)
    assert tokens.fingerprint == reference.fingerprint and same(tokens, reference)
    assert without_cache_key(tokens.facts) == without_cache_key(reference.facts)


def test_killed_preparations_end_with_the_same_tokens(lines, reference, tmp_path):
    """Processes kill themselves within a part: 10 synchronizations write a part, and 8 what is before the first."""
    for syncs, parts in ((35, 2), (5, 2), (47, 6), (None, 6)):
        job = Job(tmp_path / "output", prepare_lines, lines, tmp_path / "cache", syncs)
        output = job.wait()
        assert job.status == (0 if syncs is None else -9), output
        assert syncs is None or journal_parts(tmp_path / "cache") == parts, output
    assert output.count("continuing") == 3
    check_finished(tmp_path / "cache", reference)


@pytest.mark.parametrize("kills", [1, SLOW(8)])
def test_preparations_killed_at_random_times_end_with_the_same_tokens(kills, lines, reference, tmp_path):
    rng = random.Random(0)
    for _ in range(kills):
        complete = journal_parts(tmp_path / "cache")
        job = Job(tmp_path / "output", prepare_lines, lines, tmp_path / "cache")
        while job.running and journal_parts(tmp_path / "cache") <= complete:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        job.kill()
        assert job.status in (-9, 0), job.output
    last = Job(tmp_path / "output", prepare_lines, lines, tmp_path / "cache")
    last.wait()
    assert last.status == 0, last.output
    check_finished(tmp_path / "cache", reference)


def test_preparation_stopped_after_every_part_has_the_same_tokens(lines, tmp_path, monkeypatch):
    """Some sources have no document in some parts."""
    rare = tmp_path / "rare.jsonl"
    rare.write_text("".join(json.dumps({"text": f"rare document {i} " * 5}) + "\n" for i in range(30)))
    sources = (Source(name="lines", path=str(lines), weight=100), Source(name="rare", path=str(rare)))
    settings = Corpus(sources, vocab_size=300, val_fraction=0.2)
    whole = prepare(settings, tmp_path / "whole", 16, part_tokens=PART_TOKENS)
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
            pieces = prepare(settings, tmp_path / "pieces", 16, part_tokens=PART_TOKENS)
        except KeyboardInterrupt:
            stops += 1
    assert stops > 10 and pieces.fingerprint == whole.fingerprint and same(whole, pieces)


def test_concurrent_processes_prepare_once(lines, tmp_path):
    jobs = [Job(tmp_path / f"output-{i}", prepare_lines, lines, tmp_path / "cache") for i in range(3)]
    outputs = [job.wait() for job in jobs]
    assert [job.status for job in jobs] == [0, 0, 0], outputs
    assert sum("training a byte-level BPE" in output for output in outputs) == 1, outputs
    assert sum("waiting for another process" in output or output == "" for output in outputs) == 2, outputs
    assert sum("tokens for training" in output for output in outputs) == 1, outputs


def test_process_says_that_it_waits_for_another(lines, tmp_path):
    cache = tmp_path / "cache"
    folder = corpus_of(lines, deduplicate=True).folder(cache)
    cache.mkdir()
    with hold_lock(folder.with_name(f".{folder.name}.lock")):
        job = Job(tmp_path / "output", prepare_lines, lines, cache)
        deadline = time.monotonic() + 60
        while "waiting for another process that prepares the same tokens" not in job.output:
            assert job.running and time.monotonic() < deadline, job.output
            time.sleep(0.001)
        assert not folder.exists()
    job.wait()
    assert job.status == 0 and open_tokens(folder).facts["duplicates"] == 20, job.output


@pytest.mark.parametrize("limit", [None, 2000], ids=["bytes", "tokens"])
def test_progress_and_the_share_of_each_source_are_shown(limit, lines, tmp_path, monkeypatch, capsys):
    reports = []

    @contextmanager
    def progress(console: Console, text: str):
        yield lambda *report: reports.append(report)

    monkeypatch.setattr(sys.modules["data.prepare"], "progress", progress)
    other = write_lines(tmp_path / "other.jsonl", 100)
    sources = (Source(name="lines", path=str(lines)), Source(name="other", path=str(other), weight=0.5))
    corpus = Corpus(sources, vocab_size=300, val_fraction=0.2, max_tokens=limit)
    tokens = prepare(corpus, tmp_path / "cache", 16, Console(soft_wrap=True), part_tokens=1000)
    completed, totals = [report[0] for report in reports], {report[1] for report in reports}
    assert completed == sorted(completed) and len(completed) > 3
    assert totals == {limit or corpus.estimated_bytes()}
    documents, size = (sum(tokens.facts[split][key] for split in ("train", "test")) for key in ("documents", "bytes"))
    assert completed[-1] == (len(tokens.train) if limit else size)
    text = f"tokenized {documents:,} documents, {len(tokens.train) + len(tokens.test):,} tokens, "
    assert reports[-1][2].startswith(text)
    out = capsys.readouterr().out
    assert "read from each source, until one of them or data.max_tokens ended: lines 0.0 MB, other 0.0 MB" in out


def test_cache_that_is_no_folder_is_named(lines, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/file cannot be written \(File exists\): complete parts are kept"
    ):
        prepare(corpus_of(lines), tmp_path / "file", 16)


def test_full_disk_is_one_sentence_and_preparation_resumes(lines, reference, tmp_path):
    """A limit on the size of files stands in for the full disk. The journal grows beyond it."""
    killed = Job(tmp_path / "killed", prepare_lines, lines, tmp_path / "cache", 38)
    killed.wait()
    full = Job(tmp_path / "full", prepare_lines, lines, tmp_path / "cache", None, 4096)
    message = "cannot be written (File too large): complete parts are kept, and the same command continues"
    assert message in full.wait() and full.status == 1, full.output
    assert journal_parts(tmp_path / "cache") >= 2, full.output
    resumed = prepare(corpus_of(lines, deduplicate=True), tmp_path / "cache", 16, part_tokens=PART_TOKENS)
    assert same(resumed, reference)


def test_truncated_file_is_named(lines, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(lines, folder / "a.jsonl")
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(lines.read_bytes())[:3000])
    with pytest.raises(ValueError, match=r"sources\.text\.path=\S+ cannot be read: \S+/b\.jsonl\.xz: .*ended before"):
        prepare(corpus_of(folder), tmp_path / "cache", 16)


def test_damaged_file_is_named(lines, tmp_path, monkeypatch):
    reference = prepare(corpus_of(lines), tmp_path / "cache", 16, part_tokens=4_000)
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
    shutil.copytree(reference.folder, folder)
    file = folder / "train-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    open_tokens(folder, verify=False)
    with monkeypatch.context() as patched:
        patched.setattr("data.tokens.MAX_VERIFIED_BYTES", 0)
        open_tokens(folder)
        with pytest.raises(ValueError, match=r"train-00000\.npy does not have the checksum it was written with"):
            open_tokens(folder, verify=True)
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"train-00000\.npy has \S+ bytes, not "):
            open_tokens(folder)
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
    assert tokenizer.size > 257, "it has learned from the training text"
    held_out_text = tokenizer.tokenizer.decode(tokens.test.read(0, len(tokens.test)).tolist())
    assert all((document.text in held_out_text) == (i < held_out) for i, document in enumerate(documents))
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("the same")
    with pytest.raises(ValueError, match="all the same text"):
        prepare(corpus_of(tmp_path / "text"), tmp_path / "cache", 4)
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_text_is_read_at_the_commit_that_is_recorded(streamed, lines, tmp_path, monkeypatch):
    """The rows of a file stand in for those of the hub, which `test_hub` reads."""
    revisions = set()

    def rows(source: Source) -> LocalRows:
        revisions.add(source.revision)
        return LocalRows([lines], "text")

    monkeypatch.setattr(Source, "open", rows)
    monkeypatch.setattr(Source, "commit", lambda source: "a commit")
    corpus = Corpus((Source(name="text", hub="somebody/text"),), vocab_size=300, streamed=streamed)
    tokens = prepare(corpus, tmp_path, 16)
    assert revisions == {"a commit"} and tokens.facts["commits"] == {"text": "a commit"}


def test_existing_tokenizer_is_used(lines, tmp_path):
    first = prepare(corpus_of(lines), tmp_path / "a", 16)
    second = prepare(corpus_of(lines, tokenizer=str(first.folder)), tmp_path / "b", 16)
    assert same(first, second) and second.fingerprint == first.fingerprint


def test_text_shorter_than_a_sequence_is_rejected(lines, tmp_path):
    with pytest.raises(ValueError, match=r"sequence_length=10000000 is longer than the text: the text has .* bytes"):
        corpus_of(lines).check(tmp_path, 10_000_000)
    with pytest.raises(ValueError, match=r"sequence_length=4000 is longer than the text: the test text has \S+ tokens"):
        prepare(corpus_of(lines), tmp_path, 4_000)


def test_tokens_that_are_cut_or_removed_once_they_are_open_are_one_sentence(tmp_path):
    """A part is mapped when it is first read, the held-out ones after the last step of a run."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    array = token_array(folder, np.arange(10, dtype=np.uint16))
    os.truncate(array.files[0], 130)
    with pytest.raises(UserError, match=r"^the prepared tokens in \S+ are damaged \(.*\): remove that folder$"):
        array.read(0, 10)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"tokens were removed: the same command prepares them again$"):
        array.read(0, 10)


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


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-1]), Path.unlink])
def test_damaged_part_of_an_interrupted_preparation_is_named(damage, lines, tmp_path):
    job = Job(tmp_path / "output", prepare_lines, lines, tmp_path / "cache", 38)
    job.wait()
    (file,) = (tmp_path / "cache").glob("*/train-00001.documents.npy")
    damage(file)
    with pytest.raises(UserError, match=rf"{file} is damaged \(it does not have .*\): remove the folder {file.parent}"):
        prepare(corpus_of(lines, deduplicate=True), tmp_path / "cache", 16, part_tokens=PART_TOKENS)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (
            ["some words " * 50, "more"],
            {"max_tokens": 10},
            "max_tokens=10 is not allowed: the first document reaches it",
        ),
        (["some words"], {}, "the text is one document"),
        (["some words"], {"streamed": True}, "the text is one document"),
        (["some words", "some words"], {"max_tokens": 1000}, "the documents are all the same text"),
        (["some words", "some words"], {"deduplicate": True}, "the text is one document"),
    ],
)
def test_too_few_documents_are_rejected(texts, settings, message, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(name="s", path=str(tmp_path / "text.jsonl"))
    with pytest.raises(ValueError, match=message):
        prepare(Corpus((source,), vocab_size=300, **settings), tmp_path / "cache", 4)
    assert not [*(tmp_path / "cache").glob("tokens-*")]
