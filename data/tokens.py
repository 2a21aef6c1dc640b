"""Prepared tokens: memory-mapped arrays in a folder, opened at once and read anywhere.

    tokens.json               what they are, and a checksum of every other file; written last
    tokenizer.json            with tokenizer_config.json: the tokenizer, as Hugging Face's libraries load it
    train-00000.npy           (tokens,) uint16 or uint32: documents one after another, each followed by end-of-text
    train-00000.documents.npy (documents,) where each ends in its part, and 8 bytes of its digest
    test-00000.npy ...        the same for the held-out documents

The format is numpy's own. Others were weighed: Arrow tables through `datasets` map memory too, but give a document
(a list in a column) rather than a stretch of tokens, at some ten microseconds each; litdata and MDS hold samples of a
length fixed at preparation, in chunks that are read whole, for buckets we do not stream from. A stretch of a .npy file
is an address: opening is free, reading is a copy, any program can look into it, and the sequence length is chosen
when training.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

SPLITS = ("train", "test")
MANIFEST = "tokens.json"
#: Of the files `*.documents.npy`.
DOCUMENT = np.dtype([("end", "<u8"), ("digest", "<u8")])
#: Sets up to this many bytes are checked against their checksums whenever they are opened: a second or two.
CHECKED_BYTES = 2 << 30


class TokenArray:
    """The tokens of all parts as one array, mapped into memory part by part when they are first read.

    Args:
        files: (parts,) `.npy` files of one-dimensional arrays.
        lengths: (parts,) tokens in each.
        dtype: of the ids.

    Beside each file lies its `*.documents.npy`, if `documents` is to be asked for.
    """

    def __init__(self, files: list[Path], lengths: list[int], dtype: Any) -> None:
        self.files = files
        self.dtype = np.dtype(dtype)
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}
        self._ends: dict[int, np.ndarray] = {}
        self._views: dict[int, np.ndarray] = {}

    @classmethod
    def in_memory(cls, ids: np.ndarray, ends: np.ndarray) -> "TokenArray":
        """Return an array of one part that is in memory.

        Args:
            ids: (tokens,).
            ends: (documents,) where each ends; the last may go on behind the tokens.
        """
        made = cls([Path()], [len(ids)], ids.dtype)
        made._maps[0], made._ends[0] = ids, ends
        return made

    def __len__(self) -> int:
        """Tokens in all parts."""
        return int(self.starts[-1])

    def part(self, index: int) -> np.ndarray:
        """Return the tokens of one part, (tokens,), mapped read-only."""
        found = self._maps.get(index)
        if found is None:
            # A view of the map as a plain array is indexed several times faster than np.memmap itself.
            found = self._maps[index] = np.load(self.files[index], mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return found

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return stretches of tokens, across the borders of parts where they lie there.

        Args:
            starts: (n,) int64 places of first tokens, each in [0, len(self) - length].
            length: of each stretch.

        Returns:
            (n, length) ids.
        """
        if len(self.files) == 1:
            return self._windows(length)[starts]
        parts = np.searchsorted(self.starts, starts, side="right") - 1
        pieces = [
            self.part(part)[first : first + length]
            for part, first in zip(parts.tolist(), (starts - self.starts[parts]).tolist(), strict=True)
        ]
        for row in np.flatnonzero(starts + length > self.starts[parts + 1]).tolist():  # what goes on in the next part
            pieces[row] = self.read(int(starts[row]), int(starts[row]) + length)
        return np.concatenate(pieces).reshape(len(starts), length) if pieces else np.empty((0, length), self.dtype)

    def _windows(self, length: int) -> np.ndarray:
        """Return a view of the first part that has the stretch from each token on as a row."""
        if length not in self._views:
            self._views = {length: np.lib.stride_tricks.sliding_window_view(self.part(0), length)}
        return self._views[length]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as a new array."""
        pieces = []
        for index in range(len(self.files)):
            first, end = int(self.starts[index]), int(self.starts[index + 1])
            if first < stop and start < end:
                pieces.append(self.part(index)[max(start - first, 0) : stop - first])
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def documents(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return which document each token of some stretches is of, counted from 0 at the stretch's first.

        Args:
            starts: (n,) places of first tokens, each in [0, len(self) - length].
            length: of each stretch.

        Returns:
            (n, length) int32.
        """
        out = np.empty((len(starts), length), np.int32)
        for row, start in zip(out, starts.tolist(), strict=True):
            place, number = start, 0
            while place < start + length:
                index = int(np.searchsorted(self.starts, place, side="right")) - 1
                stop = min(start + length, int(self.starts[index + 1]))
                within = np.arange(place, stop) - self.starts[index]
                ended = np.searchsorted(self._document_ends(index), within, side="right")
                row[place - start : stop - start] = ended - ended[0] + number
                place, number = stop, number + int(ended[-1] - ended[0]) + 1  # a part ends with a document
        return out

    def _document_ends(self, index: int) -> np.ndarray:
        if index not in self._ends:
            ends = np.load(documents_file(self.files[index]), mmap_mode="r")["end"]
            self._ends[index] = np.ascontiguousarray(ends, dtype=np.int64)  # or each search would convert it
        return self._ends[index]


def documents_file(file: Path) -> Path:
    """Return where the ends of a part's documents are."""
    return file.with_suffix(".documents.npy")


class Tokens(NamedTuple):
    """A prepared corpus.

    Attributes:
        train: ids of the training documents, each followed by end-of-text.
        test: the same for the held-out documents.
        fingerprint: hash of tokens and tokenizer: equal tokens have equal fingerprints, wherever they came from. Of a
            text that is streamed, hash of the sources' identities, the tokenizer and the held-out tokens.
        folder: where they lie.
        facts: contents of `tokens.json`: for each split documents, bytes of text, tokens and parts; the vocabulary.
    """

    train: TokenArray
    test: TokenArray
    fingerprint: str
    folder: Path
    facts: dict[str, Any]


def open_tokens(folder: Path, verify: bool | None = None) -> Tokens:
    """Open prepared tokens.

    Args:
        folder: that a preparation has finished.
        verify: whether to compare every file with its checksum. `None`: if they are at most 2 GiB; sizes always.

    Raises:
        ValueError: a file is missing or not what it was.
    """
    try:
        facts = unsealed((folder / MANIFEST).read_text())
        arrays, size = {}, 0
        for split in SPLITS:
            parts = facts[split]["parts"]
            files = [folder / part["file"] for part in parts]
            arrays[split] = TokenArray(files, [part["tokens"] for part in parts], facts["dtype"])
        for name, expected in facts["files"].items():
            found = (folder / name).stat().st_size
            if found != expected["bytes"]:
                raise ValueError(f"{name} has {found:,} bytes, not {expected['bytes']:,}")
            size += found
        if verify or (verify is None and size <= CHECKED_BYTES):
            with ThreadPoolExecutor() as pool:
                found_sums = pool.map(checksum, [folder / name for name in facts["files"]])
                for (name, expected), found_sum in zip(facts["files"].items(), found_sums, strict=True):
                    if found_sum != expected["sha256"]:
                        raise ValueError(f"{name} does not have the checksum it was written with")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the prepared tokens in {folder} are damaged ({error}): remove that folder") from error
    return Tokens(arrays["train"], arrays["test"], facts["fingerprint"], folder, facts)


def sealed(facts: dict[str, Any]) -> str:
    """Return facts as JSON, with a checksum of their own."""
    return json.dumps({**facts, "checksum": _checksum_of(facts)}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """Return the facts that `sealed` wrote.

    Raises:
        ValueError: they are not what was written.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.pop("checksum", None) != _checksum_of(facts):
        raise ValueError("it does not have the checksum it was written with")
    return facts


def _checksum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
