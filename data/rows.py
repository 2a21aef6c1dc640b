"""Rows of local files, one after another: each format is read for its text alone, and reading resumes at any row."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.reading import check_record
from data.files import format_of, parse_line, parse_text, unpacked
from data.shapes import RowsState

#: Rows of a Parquet file that are decoded at once.
PARQUET_ROWS = 256


class LocalRows:
    """The rows of files as dictionaries; of a Parquet file only one column is read."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files = files
        self.column = column
        self._file, self._row = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last row, as plain values for JSON."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of an earlier reading of the same files; raise `ValueError` if it is none."""
        position = check_record(RowsState, dict(state))
        self._file, self._row = position.file, position.row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows. A damaged file raises the error of its format or compression; `file` is its name."""
        while self._file < len(self.files):
            for row in _rows_of(self.file, self.column, self._row):
                self._row += 1
                yield row
            self._file, self._row = self._file + 1, 0

    @property
    def file(self) -> Path:
        """The file that is being read."""
        return self.files[min(self._file, len(self.files) - 1)]


def _rows_of(file: Path, column: str, skip: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file but the first ones."""
    kind = format_of(file)
    if kind == "parquet":
        return _parquet_rows(file, column, skip)
    rows = {"text": _whole_text, "lines": _lines, "json": _json_rows}[kind or "text"](file)
    return itertools.islice(rows, skip, None)


def _whole_text(file: Path) -> Iterator[dict[str, Any]]:
    with unpacked(file) as content:
        yield {"text": io.TextIOWrapper(content, encoding="utf-8").read()}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with unpacked(file) as content:
        for line in content:
            yield parse_line(line.decode())


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list, or of lines."""
    with unpacked(file) as content:
        is_list = content.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_list:
        yield from _lines(file)
        return
    with unpacked(file) as content:
        rows = parse_text(content.read().decode("utf-8-sig"))
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"a row is not a JSON object: {str(row)[:40]!r}")
        yield row


def _parquet_rows(file: Path, column: str, skip: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file; one row of other columns, not decoded, if it lacks the column."""
    import pyarrow.parquet as pq  # takes half a second

    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if column not in names:
            yield from [dict.fromkeys(names)][skip:]
            return
        groups = list(range(parquet.num_row_groups))
        while groups and skip >= (size := parquet.metadata.row_group(groups[0]).num_rows):
            skip -= size
            del groups[0]
        for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[column]):
            for value in batch.column(column).slice(min(skip, len(batch))).to_pylist():
                yield {column: value}
            skip = max(0, skip - len(batch))
