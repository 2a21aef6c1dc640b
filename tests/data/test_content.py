"""Text is known by its content: touched, moved or copied it is the same, edited another; tokens outlive it."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import data.content
from common.console import make_console
from data import Corpus, Source, SourceError, StreamingDataset, Tokenizer, Tokens, changes, load_tokenizer, prepare
from data.content import ContentIndex, UnknownContentError
from data.tokenizer import train_tokenizer
from tests.data.preparation import PART_TOKENS, corpus_of, write_lines


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with two files of short documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    write_lines(folder / "a.jsonl", 60)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"other words {i}"}) + "\n" for i in range(40)))
    return folder


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that are hashed. Nothing is known of earlier ones, as in a new process."""
    files: list[Path] = []
    digest = data.content.sha256
    monkeypatch.setattr(data.content, "sha256", lambda file: files.append(file) or digest(file))
    monkeypatch.setattr(data.content, "_known", {})
    return files


def edit(file: Path) -> None:
    """Change a file, but neither its size nor its modification time."""
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"other", b"their"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def prepare_and_print(path: Path | str, cache: Path, **settings) -> Tokens:
    return prepare(corpus_of(path, **settings), cache, 4, make_console())


def files_in(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_unchanged_files_are_hashed_once(text, hashed, tmp_path, monkeypatch):
    cache, (a, b) = tmp_path / "cache", sorted(text.iterdir())

    def digests() -> list[str]:
        monkeypatch.setattr(data.content, "_known", {})
        hashed.clear()
        return ContentIndex(cache).digests(str(text), [a, b])

    with pytest.raises(UnknownContentError):
        ContentIndex(cache, only_known=True).digests(str(text), [a, b])
    assert not hashed and not cache.exists()
    first = digests()
    assert sorted(hashed) == [a, b]
    assert digests() == first and hashed == []
    os.utime(a)
    assert digests() == first and hashed == [a]
    edit(b)
    assert digests()[0] == first[0] and digests()[1] != first[1]
    (index,) = cache.glob(".text-*.json")
    for damage in ("", "[", "{}", "[1]", '[["x"]]', "[" * 100_000, json.dumps([[str(a), 1, 2, 3, 4, 5]])):
        index.write_text(damage)
        assert digests()[0] == first[0] and sorted(hashed) == [a, b]
        assert digests()[0] == first[0] and hashed == []
    cache = tmp_path / "text" / "a.jsonl" / "no folder"
    assert digests()[0] == first[0] and digests()[0] == first[0] and sorted(hashed) == [a, b]


def test_file_that_is_changed_while_it_is_hashed_is_named(text, monkeypatch):
    digest = data.content.sha256
    monkeypatch.setattr(data.content, "sha256", lambda file: (file.open("a").write("\n"), digest(file))[1])
    with pytest.raises(SourceError, match=r"path=\S+ cannot be read: \S+\.jsonl: it is being changed: wait until"):
        corpus_of(text).cache_key()


@pytest.mark.parametrize("streamed", [False, True])
def test_touched_or_moved_text_is_not_prepared_again(streamed, text, tmp_path, capsys):
    first = prepare_and_print(text, tmp_path / "cache", streamed=streamed)
    written = files_in(first.folder)
    capsys.readouterr()
    for file in text.iterdir():
        file.touch()
    assert prepare_and_print(text, tmp_path / "cache", streamed=streamed).fingerprint == first.fingerprint
    assert files_in(first.folder) == written
    moved = text.rename(tmp_path / "moved")
    again = prepare_and_print(moved, tmp_path / "cache", streamed=streamed)
    assert (again.fingerprint, again.folder) == (first.fingerprint, first.folder)
    assert capsys.readouterr().out == ""
    edit(moved / "b.jsonl")
    other = prepare_and_print(moved, tmp_path / "cache", streamed=streamed)
    assert other.fingerprint != first.fingerprint and other.folder != first.folder
    assert "tokens" in capsys.readouterr().out


def test_order_of_sources_is_of_the_text(text, tmp_path):
    """The first source begins."""
    sources = [Source(name=name, path=str(text / f"{name}.jsonl")) for name in "ab"]
    one, other = (prepare(Corpus(tuple(order), vocab_size=300), tmp_path, 4) for order in (sources, sources[::-1]))
    assert one.folder != other.folder and one.fingerprint != other.fingerprint


def test_tokens_are_used_without_the_text(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = prepare_and_print("text", Path("cache"))
    assert prepare_and_print(text, Path("cache")).folder == first.folder  # by another path
    shutil.rmtree(text)
    (tmp_path / "elsewhere").mkdir()
    shutil.move("cache", "elsewhere/moved [cache]")
    monkeypatch.chdir("elsewhere")
    cache = Path("moved [cache]")
    capsys.readouterr()
    for path in ("text", text):
        corpus_of(path).check(cache, 4)
        again = prepare_and_print(path, cache)
        assert again.fingerprint == first.fingerprint and again.folder == cache / first.folder.name
        line = f"data.sources.text.path={path} is not there: using the tokens that were prepared from it, "
        assert capsys.readouterr().out == f"{line}{again.folder}\n"
    for path, settings in (("other", {}), ("text", {"vocab_size": 301}), ("text", {"streamed": True})):
        for start in (lambda corpus: corpus.check(cache, 4), lambda corpus: prepare(corpus, cache, 4)):
            with pytest.raises(SourceError, match=rf"^sources\.text\.path={path} does not exist: it must be a file"):
                start(corpus_of(path, **settings))
    (tmp_path / "elsewhere" / "text").mkdir()
    assert prepare_and_print("text", cache).fingerprint == first.fingerprint, "a folder without text"
    for damage in ("", "[]", '{"checksum": 1}', "[" * 100_000):
        (cache / "tokens-0").mkdir(exist_ok=True)
        (cache / "tokens-0" / "tokens.json").write_text(damage)
        assert prepare_and_print("text", cache).fingerprint == first.fingerprint


def test_tokens_of_two_texts_of_a_path_that_is_gone_are_ambiguous(text, tmp_path):
    first = prepare_and_print(text, tmp_path / "cache")
    edit(text / "b.jsonl")
    second = prepare_and_print(text, tmp_path / "cache")
    shutil.rmtree(text)
    names = " and ".join(sorted((str(first.folder), str(second.folder))))
    with pytest.raises(SourceError, match=rf"several texts there were prepared: remove all but one of {names}$"):
        prepare_and_print(text, tmp_path / "cache")
    shutil.rmtree(first.folder)
    assert prepare_and_print(text, tmp_path / "cache").fingerprint == second.fingerprint


def test_tokens_of_a_mixture_need_the_text_that_is_left_as_it_was(text, tmp_path):
    sources = tuple(Source(name=name, path=str(text / f"{name}.jsonl")) for name in "ab")
    corpus = Corpus(sources, vocab_size=300)
    first = prepare(corpus, tmp_path / "cache", 4)
    (text / "a.jsonl").unlink()
    assert prepare(corpus, tmp_path / "cache", 4).fingerprint == first.fingerprint
    edit(text / "b.jsonl")
    with pytest.raises(SourceError, match=r"^sources\.a\.path=\S+ does not exist"):
        prepare(corpus, tmp_path / "cache", 4)


@pytest.mark.parametrize("part", [0, 2])
def test_text_that_is_edited_while_it_is_prepared_never_mixes_with_the_one_before(part, text, tmp_path, monkeypatch):
    """Restored, it is prepared to its end as if nothing had happened."""
    whole = prepare(corpus_of(text), tmp_path / "whole", 4, part_tokens=PART_TOKENS // 4)
    backup = shutil.copytree(text, tmp_path / "backup")
    encode, calls = Tokenizer.encode, itertools.count()

    def edit_and_encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        if next(calls) == part:
            edit(text / "b.jsonl")
        return encode(tokenizer, texts)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode", edit_and_encode)
        with pytest.raises(SourceError, match=r"path=\S+ has changed since it was opened: it must stay as it is"):
            prepare(corpus_of(text), tmp_path / "cache", 4, part_tokens=PART_TOKENS // 4)
    shutil.copytree(backup, text, dirs_exist_ok=True)
    again = prepare(corpus_of(text), tmp_path / "cache", 4, part_tokens=PART_TOKENS // 4)
    assert again.fingerprint == whole.fingerprint


def test_stream_goes_on_with_touched_and_moved_text_and_stops_at_edited(text, tmp_path):
    head = prepare(corpus_of(text, streamed=True), tmp_path / "cache", 4)

    def stream(path: Path) -> StreamingDataset:
        corpus = corpus_of(path, streamed=True).pinned_to(head.facts["commits"])
        return StreamingDataset(corpus, load_tokenizer(str(head.folder)), head.facts["threshold"], 4, 7, 80)

    reference = stream(text)
    rows = reference.take(0, 200).tolist()
    reference.close()
    first = stream(text)
    assert first.take(0, 90).tolist() == rows[:90]
    for file in text.iterdir():
        file.touch()
    assert first.take(90, 40).tolist() == rows[90:130]
    state = json.loads(json.dumps(first.state()))
    first.close()
    moved = text.rename(tmp_path / "moved")
    resumed = stream(moved)
    resumed.load_state(state)
    assert resumed.take(130, 70).tolist() == rows[130:]
    edit(moved / "b.jsonl")
    with pytest.raises(SourceError, match="has changed since it was opened: it must stay as it is"):
        resumed.take(200, 100)
    resumed.close()
    edited = stream(moved)
    edited.load_state(state)
    with pytest.raises(SourceError, match="has changed since it was opened: it must stay as it is"):
        edited.take(130, 1)


def test_what_differs_between_two_preparations_is_named(text, tmp_path):
    cache, tokenizers = tmp_path / "cache", [tmp_path / name for name in ("mine", "other")]
    for folder, words in zip(tokenizers, ("the state of our union", "other words"), strict=True):
        folder.mkdir()
        train_tokenizer([words] * 20, 270).save(folder)
    first = prepare(corpus_of(text), cache, 4)
    given = prepare(corpus_of(text, tokenizer=str(tokenizers[0])), cache, 4)
    assert changes(given, first.folder.name) == ["the tokenizer", "data.vocab_size"]
    shutil.copytree(tokenizers[1], tokenizers[0], dirs_exist_ok=True)
    other = prepare(corpus_of(text, tokenizer=str(tokenizers[0])), cache, 4)
    assert changes(other, given.folder.name) == ["the tokenizer"] and changes(other, other.folder.name) == []
    settings = {"val_fraction": 0.3, "deduplicate": True, "max_tokens": 1000}
    changed = prepare(corpus_of(text, **settings), cache, 4)
    assert changes(changed, first.folder.name) == [f"data.{name}" for name in settings]
    weighted = prepare(
        Corpus((Source(name="text", path=str(text), weight=2),), vocab_size=300, val_fraction=0.2), cache, 4
    )
    assert changes(weighted, first.folder.name) == ["data.sources"]
    streams = [prepare(corpus_of(text, streamed=True), cache, 4)]
    edit(text / "b.jsonl")
    streams.append(prepare(corpus_of(text, streamed=True), cache, 4))
    assert changes(streams[1], streams[0].folder.name) == ["the text"]
    assert changes(prepare(corpus_of(text), cache, 4), first.folder.name) == ["the text"]
    shutil.rmtree(first.folder)
    assert changes(weighted, first.folder.name) == changes(weighted, "../nothing") == []
