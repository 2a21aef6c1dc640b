"""Writes the files of a folder of prepared tokens; each is complete or absent."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_writer, sha256, write_atomic
from data.sources import Document
from data.tokenizer import TOKENIZER_FILES, Tokenizer
from data.tokens import DOCUMENT_DTYPE, MANIFEST, SPLITS, documents_file, dump_with_checksum, read_manifest

#: Documents of each split with their token ids.
EncodedDocuments = dict[str, list[tuple[Document, np.ndarray]]]
#: Path of each source as it is set, by its name.
Paths = dict[str, str | None]


def digest_key(digest: bytes) -> int:
    """Return the 8 bytes of a digest that are stored with the tokens, as an integer."""
    return int.from_bytes(digest[-8:])


def _save_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array and return its `_file_facts`."""
    with atomic_writer(path) as file:
        # np.save is not used because its error does not give the reason why it could not write.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.view(np.uint8).data)
    return _file_facts(path)


def _file_facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_part(
    folder: Path, number: int, encoded: EncodedDocuments, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write documents and their ids as one part of each split.

    Returns the manifest's entry about the part, by split, whose `file` is `None` if the split has no documents; and the
    size and checksum of each file, by name.
    """
    part, files = {}, {}
    for split, documents in encoded.items():
        file = f"{split}-{number:05}.npy" if documents else None
        ids = np.concatenate([ids for _, ids in documents]) if documents else np.empty(0, tokenizer.dtype)
        part[split] = {
            "file": file,
            "tokens": len(ids),
            "documents": len(documents),
            "bytes": sum(document.size for document, _ in documents),
        }
        if file:
            index = np.empty(len(documents), DOCUMENT_DTYPE)
            index["end"] = np.cumsum([len(ids) for _, ids in documents])
            index["digest"] = [digest_key(document.digest) for document, _ in documents]
            index["bytes"] = [document.size for document, _ in documents]
            path = folder / file
            for target, array in ((path, ids), (documents_file(path), index)):
                files[target.name] = _save_array(target, array)
    return part, files


def write_manifest(
    folder: Path,
    cache_key: dict[str, Any],
    paths: Paths,
    tokenizer: Tokenizer,
    parts: list[dict[str, Any]],
    files: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Write the manifest, which completes the folder, and return its contents.

    The folder has the tokenizer's files too. The cache key is that of the time when the preparation began. The parts
    and files are all that `write_part` has returned.
    """
    files = files | {name: _file_facts(folder / name) for name in TOKENIZER_FILES}
    facts: dict[str, Any] = {
        "vocab_size": tokenizer.size,
        "end_of_text": tokenizer.end,
        "dtype": np.dtype(tokenizer.dtype).name,
        **more,
    }
    for split in SPLITS:
        written = [part[split] for part in parts if part[split]["file"]]
        totals = {key: sum(part[key] for part in written) for key in ("documents", "bytes", "tokens")}
        facts[split] = totals | {"parts": written}
    hashed: list[Any] = [facts["dtype"], tokenizer.end, sorted((n, f["sha256"]) for n, f in files.items())]
    if "streamed" in cache_key:  # there are no files of training tokens that could be hashed
        hashed += [cache_key, facts["commits"]]
    facts["fingerprint"] = hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:16]
    facts |= {"files": files, "cache_key": cache_key, "paths": [paths]}
    write_atomic(folder / MANIFEST, dump_with_checksum(facts))
    return facts


def add_paths(folder: Path, paths: Paths) -> None:
    """Add paths of the same text to a manifest, where it can be written: they find the tokens if the text is gone."""
    facts = read_manifest(folder)
    if paths not in facts["paths"]:
        with suppress(OSError):
            write_atomic(folder / MANIFEST, dump_with_checksum(facts | {"paths": [*facts["paths"], paths]}))
