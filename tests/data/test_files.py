"""Every text below a folder is read, once and as it was written, whatever lies beside it; what is cut off is named."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import Mixture, Source, SourceError

TEXTS = [f"Document {i} says something of its own, {i * i} times over." for i in range(6)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts_of(path: Path | str, state: dict | None = None) -> list[str]:
    return [document.text for document in Mixture([Source(name="s", path=str(path))], state)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[("k", "v")]] * 6, pa.map_(pa.string(), pa.string())),
        pa.array([{"m": [("k", 1)]}] * 6, pa.struct([("m", pa.map_(pa.string(), pa.int32()))])),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 6, pa.binary(16))),
        pa.nulls(6),
        pa.array([["x"]] * 6),
    ],
    ids=["map", "struct", "uuid", "null", "list"],
)
def test_parquet_columns_beside_the_text_may_have_any_type(column, tmp_path):
    pq.write_table(pa.table({"other": column, "text": TEXTS}), tmp_path / "a.parquet")
    assert texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_texts_of_parquet_files_may_have_any_type_of_text(kind, tmp_path):
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("order", [1, -1])
def test_rows_without_text_are_skipped_in_every_format(suffix, order, tmp_path):
    shards = [[{"text": text} for text in TEXTS], [{"text": None}] * 3, [{"body": "x"}, {"body": "y"}]]
    for i, rows in enumerate(shards[::order]):
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{i}.parquet")
        elif suffix == "json":
            (tmp_path / f"{i}.json").write_text(json.dumps(rows, indent=1))
        else:
            (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts_of(tmp_path) == TEXTS
    for taken in range(7):
        first = Mixture([Source(name="s", path=str(tmp_path))])
        assert [document.text for _, document in zip(range(taken), first, strict=False)] == TEXTS[:taken]
        assert texts_of(tmp_path, json.loads(json.dumps(first.state()))) == TEXTS[taken:]


def test_numbers_in_a_later_parquet_file_are_an_error_and_no_text(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "1.parquet")
    with pytest.raises(SourceError, match=r"sources\.s\.column=text holds '1' in \S+1\.parquet, which is not a text"):
        texts_of(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_marks_are_not_text(encoding, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode(encoding))
    documents = list(Mixture([Source(name="s", path=str(tmp_path))]))
    assert [document.text for document in documents] == TEXTS
    (tmp_path / "only.txt").write_bytes("\ufeff".encode())
    assert texts_of(tmp_path) == TEXTS


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packed", PACK)
def test_compressed_files_that_are_cut_off_are_an_error(packed, tmp_path):
    long = "\n".join(f"{i * 7919 % 100003} and {i}" for i in range(3000)).encode()
    whole = PACK[packed](long)
    (tmp_path / f"b.txt{packed}").write_bytes(PACK[packed](b"first") + PACK[packed](b" and second"))
    assert texts_of(tmp_path) == ["first and second"]
    for kept in (len(whole) // 2, len(whole) - 1):
        (tmp_path / f"a.txt{packed}").write_bytes(whole[:kept])
        with pytest.raises(SourceError, match=rf"cannot be read: \S+a\.txt\{packed}: \S+"):
            texts_of(tmp_path)


@pytest.mark.parametrize("name", ["part[1]", "a\\b", "a::b", "http:x", "{a,b}", "a*b?", " a ", "é 東", "gzip:"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_file_names_are_names(name, suffix, tmp_path):
    file = tmp_path / f"{name}{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), file)
    else:
        file.write_bytes(gzip.compress(LINES) if suffix.endswith("gz") else LINES)
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(file) == TEXTS


def test_linked_folders_are_read_once(tmp_path):
    for name in ("data", "elsewhere", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data" / "file.jsonl").symlink_to(tmp_path / "other" / "a.jsonl")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    assert sorted(texts_of(tmp_path / "data")) == ["data", "elsewhere", "other"]
    assert sorted(texts_of(tmp_path / "data" / "**" / "*.jsonl")) == ["data", "elsewhere", "other"]


def test_linked_file_beside_itself_is_read_once_under_the_first_name(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("below/b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "a.jsonl").symlink_to("c.jsonl")
    (tmp_path / "d.jsonl").symlink_to("below/b.jsonl")
    for path in (tmp_path, tmp_path / "**" / "*.jsonl"):
        assert texts_of(path) == ["c", "below/b"]


def test_hidden_files_and_folders_are_skipped_unless_they_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07Mac OS X \xb0")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_bytes(LINES)
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(tmp_path / "*.jsonl") == TEXTS
    assert texts_of(tmp_path / ".ipynb_checkpoints") == TEXTS
    assert texts_of(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl") == TEXTS


def test_json_beside_data_is_a_description_of_it(tmp_path):
    (tmp_path / "dataset_infos.json").write_text('{"features": {}}')
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert texts_of(tmp_path) == TEXTS
    (tmp_path / "b.txt").write_text("another format")
    with pytest.raises(SourceError, match=r"holds files of several formats \(\S+b\.txt and \S+a\.jsonl\)"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    "content", [json.dumps([{"text": text} for text in TEXTS], indent=2).encode(), LINES, b"\xef\xbb\xbf" + LINES]
)
def test_json_files_hold_a_list_or_lines(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    assert texts_of(tmp_path) == TEXTS
    (tmp_path / "a.json").write_bytes(b"[1, 2]")
    with pytest.raises(SourceError, match=r"a\.json: a row is not a JSON object: '1'"):
        texts_of(tmp_path)
