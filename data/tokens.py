"""Prepared tokens: memory-mapped arrays in a folder, which open at once and are read at any position.

    tokens.json               description, and a checksum of every other file; written last
    tokenizer.json            with tokenizer_config.json: the tokenizer, in the format of Hugging Face's libraries
    train-00000.npy           (tokens,) uint16 or uint32: documents one after another, each followed by end-of-text
    train-00000.documents.npy (documents,) end of each document in its part, 8 bytes of its digest, bytes of its text
    test-00000.npy ...        the same for the held-out documents

The format is numpy's own: opening is free, reading is a copy, and the sequence length is chosen when training. Arrow
tables of `datasets` return whole documents; litdata and MDS store samples of a fixed length, in chunks.
"""

import hashlib
import itertools
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.errors import UserError, one_line
from common.files import sha256
from common.reading import check_record, open_regular, parse_json, read_bytes
from data.shapes import Manifest
from data.tokenizer import TOKENIZER_FILES

SPLITS = ("train", "test")
MANIFEST = "tokens.json"
#: Data type of the files `*.documents.npy`.
DOCUMENT_DTYPE = np.dtype([("end", "<u8"), ("digest", "<u8"), ("bytes", "<u8")])
#: Maximum bytes of a folder whose checksums are compared whenever it is opened, which takes a second or two.
MAX_VERIFIED_BYTES = 2 << 30


class TokenArray:
    """The tokens of all parts, each in a `.npy` file that is mapped into memory when it is first read, as one array."""

    def __init__(self, files: list[Path], lengths: list[int], dtype: Any) -> None:
        self.files = files
        self.dtype = np.dtype(dtype)
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}
        self._windows: dict[int, np.ndarray] = {}  # of the first part, by the last length: a view takes 10 us to make

    @classmethod
    def in_memory(cls, ids: np.ndarray) -> "TokenArray":
        """Return an array of one part that is in memory."""
        array = cls([Path()], [len(ids)], ids.dtype)
        array._maps[0] = ids
        return array

    def __len__(self) -> int:
        """Number of tokens in all parts."""
        return int(self.starts[-1])

    def part(self, index: int) -> np.ndarray:
        """Return the tokens of one part, (tokens,), mapped read-only.

        Raises:
            UserError: its file has been removed or changed since it was checked.
        """
        if index not in self._maps:
            try:
                # A view of the map as a plain array is indexed several times faster than np.memmap itself.
                self._maps[index] = np.load(self.files[index], mmap_mode="r", allow_pickle=False).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise damaged(self.files[index].parent, error) from error
        return self._maps[index]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the slices of `length` tokens at (n,) int64 positions, (n, length); they may cross the parts."""
        if len(self.files) == 1:
            if length not in self._windows:
                self._windows = {length: np.lib.stride_tricks.sliding_window_view(self.part(0), length)}
            return self._windows[length][starts]
        parts = np.searchsorted(self.starts, starts, side="right") - 1
        slices = [
            self.part(part)[first : first + length]
            for part, first in zip(parts.tolist(), (starts - self.starts[parts]).tolist(), strict=True)
        ]
        for row in np.flatnonzero(starts + length > self.starts[parts + 1]).tolist():  # slices that cross a border
            slices[row] = self.read(int(starts[row]), int(starts[row]) + length)
        return np.concatenate(slices).reshape(len(starts), length) if slices else np.empty((0, length), self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as a new array."""
        slices = []
        for index in range(len(self.files)):
            first, end = int(self.starts[index]), int(self.starts[index + 1])
            if first < stop and start < end:
                slices.append(self.part(index)[max(start - first, 0) : stop - first])
        return np.concatenate(slices) if slices else np.empty(0, self.dtype)


def documents_file(file: Path) -> Path:
    """Return the path of the ends and digests of a part's documents."""
    return file.with_suffix(".documents.npy")


class Tokens(NamedTuple):
    """A prepared corpus. Each document is followed by end-of-text; `facts` are the contents of `tokens.json`.

    The fingerprint is a hash of the tokens and the tokenizer, which does not depend on where they came from. For a
    streamed text it is a hash of the sources' identities, the tokenizer and the held-out tokens.
    """

    train: TokenArray
    test: TokenArray
    fingerprint: str
    folder: Path
    facts: dict[str, Any]

    def held_out_bytes(self, start: int, stop: int) -> float:
        """Return the bytes in UTF-8 of the held-out text that tokens [start, stop) stand for.

        They are those of the text, not of the decoded tokens: a tokenizer may drop accents, or know no word. A document
        that is not whole counts by the share of its tokens. Raises `UserError` if the documents' file is damaged.
        """
        size, first = 0.0, 0
        for part in self.facts["test"]["parts"]:
            try:
                documents = read_documents(documents_file(self.folder / part["file"]))
            except (OSError, ValueError) as error:
                raise damaged(self.folder, error) from error
            ends = first + documents["end"].astype(np.int64)
            begins = np.concatenate([[first], ends[:-1]])
            inside = (np.minimum(ends, stop) - np.maximum(begins, start)).clip(min=0)
            size += float((documents["bytes"] * (inside / (ends - begins))).sum())
            first += part["tokens"]
        return size


def read_documents(file: Path) -> np.ndarray:
    """Return the ends, digests and sizes of a part's documents, (documents,) `DOCUMENT_DTYPE`.

    Raises:
        ValueError: they are none, or their ends do not increase.
    """
    with open_regular(file) as content:
        header = _read_header(content)
        rows = content.read()
    if header is None or header != ((len(rows) // DOCUMENT_DTYPE.itemsize,), DOCUMENT_DTYPE):
        raise ValueError(f"{file.name} is not about documents")
    documents = np.frombuffer(rows, DOCUMENT_DTYPE, header[0][0])
    if (np.diff(documents["end"].astype(np.int64), prepend=0) <= 0).any():
        raise ValueError(f"{file.name} has a document that ends before it begins")
    return documents


def damaged(folder: Path, error: Exception) -> UserError:
    """Return the error for a folder of tokens that is prepared again if it is not there."""
    if isinstance(error, PermissionError):
        return UserError(f"the prepared tokens in {folder} cannot be read ({error.strerror} at {error.filename})")
    if not folder.exists():
        return UserError(f"the prepared tokens in {folder} were removed: the same command prepares them again")
    return UserError(f"the prepared tokens in {folder} are damaged ({one_line(error)}): remove that folder")


def open_tokens(folder: Path, verify: bool | None = None) -> Tokens:
    """Open the tokens of a finished preparation; raise `UserError` if a file is missing or damaged.

    `verify` says whether to compare every file with its checksum, besides its size; `None` does so for at most 2 GiB.
    """
    try:
        facts = read_manifest(folder)
        arrays = {}
        for split in SPLITS:
            parts = facts[split]["parts"]
            files = [folder / part["file"] for part in parts]
            arrays[split] = TokenArray(files, [part["tokens"] for part in parts], facts["dtype"])
        _verify(folder, facts["files"], verify)
        for part in itertools.chain.from_iterable(facts[split]["parts"] for split in SPLITS):
            _check_arrays(folder / part["file"], part, np.dtype(facts["dtype"]))
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    return Tokens(arrays["train"], arrays["test"], facts["fingerprint"], folder, facts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts about prepared tokens; raise `ValueError` or `OSError` if they are damaged, or not there."""
    if (folder / MANIFEST).is_symlink():
        raise ValueError(f"{MANIFEST} is a link")
    facts = load_with_checksum(read_bytes(folder / MANIFEST))
    check_record(Manifest, facts)
    return facts


def changes(tokens: Tokens, earlier: str) -> list[str]:
    """Return what earlier tokens in the same cache were made from otherwise; `earlier` is the name of their folder.

    It is "the text", "the tokenizer", a version, and the keys of settings; nothing if the earlier folder is gone.
    """
    try:
        before = _inputs(read_manifest(tokens.folder.with_name(Path(earlier).name)))
    except (OSError, ValueError):
        return []
    after = _inputs(tokens.facts)
    return [name for name in after if before[name] != after[name]]


def _inputs(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what tokens were made from, by its name in a message."""
    key, sources = facts["cache_key"], facts["cache_key"]["sources"]
    of_settings = ("column", "weight")
    texts = {name: {k: v for k, v in source.items() if k not in of_settings} for name, source in sources.items()}
    settings = {name: [source.get(k) for k in of_settings] for name, source in sources.items()}
    trained = isinstance(key["tokenizer"], dict) and "vocab_size" in key["tokenizer"]
    return {
        "the text": [list(texts.values()), list(facts["commits"].values())],
        "the tokenizer": None if trained else [key["tokenizer"], facts["files"].get(TOKENIZER_FILES[0])],
        "the version of the package tokenizers": key["tokenizers"],
        "the layout of prepared tokens": key["layout"],
        "data.vocab_size": key["tokenizer"] if trained else None,
        "data.sources": [settings, key["order"]],
        "data.mode": "streamed" in key,
        **{f"data.{name}": key[name] for name in ("val_fraction", "deduplicate", "max_tokens")},
    }


def _verify(folder: Path, files: dict[str, dict[str, Any]], checksums: bool | None) -> None:
    """Raise `ValueError` unless the files are files of their sizes and, if asked for or fast, with their checksums."""
    for name, expected in files.items():
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is not a file of the folder")
        size = status.st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes, not {expected['bytes']:,}")
    if checksums is None:
        checksums = sum(expected["bytes"] for expected in files.values()) <= MAX_VERIFIED_BYTES
    if checksums:
        with ThreadPoolExecutor() as pool:
            digests = pool.map(sha256, [folder / name for name in files])
            for (name, expected), digest in zip(files.items(), digests, strict=True):
                if digest != expected["sha256"]:
                    raise ValueError(f"{name} does not have the checksum it was written with")


def _check_arrays(file: Path, part: dict[str, Any], dtype: np.dtype) -> None:
    """Raise `ValueError` unless the headers of a part's files say what the manifest does, and the documents fill it."""
    _check_header(file, dtype, part["tokens"])
    _check_header(documents_file(file), DOCUMENT_DTYPE, part["documents"])
    with documents_file(file).open("rb") as documents:
        documents.seek(-DOCUMENT_DTYPE.itemsize, os.SEEK_END)
        (last,) = np.frombuffer(documents.read(), DOCUMENT_DTYPE)
    if last["end"] != part["tokens"]:
        raise ValueError(f"{file.name} has {part['tokens']:,} tokens, but its documents end at {last['end']:,}")


def _check_header(file: Path, dtype: np.dtype, length: int) -> None:
    with open_regular(file) as content:
        header = _read_header(content)
        rest = file.stat().st_size - content.tell()
    if header != ((length,), dtype) or rest != length * dtype.itemsize:
        raise ValueError(f"{file.name} is no array of {length:,} {dtype.name if dtype.names is None else 'documents'}")


def _read_header(content: BinaryIO) -> tuple[tuple[int, ...], np.dtype] | None:
    """Read the header of an open file with an array; return its shape and data type, `None` if there is none."""
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            return None
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    except Exception:  # numpy lets Python parse it, which can fail in any way
        return None
    return shape, dtype


def dump_with_checksum(facts: dict[str, Any]) -> str:
    """Return facts as JSON, with a checksum of themselves."""
    return json.dumps({**facts, "checksum": _checksum_of(facts)}, indent=1)


def load_with_checksum(text: str | bytes) -> dict[str, Any]:
    """Return the facts that `dump_with_checksum` wrote; raise `ValueError` if the text has changed since."""
    facts = parse_json(text)
    if not isinstance(facts, dict) or facts.pop("checksum", None) != _checksum_of(facts):
        raise ValueError("it does not have the checksum it was written with")
    return facts


def _checksum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
