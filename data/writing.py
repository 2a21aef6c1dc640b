"""Files of a folder of prepared tokens, written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console

from data.sources import Document
from data.tokenizer import TOKENIZER_FILES, TextEncoder
from data.tokens import DOCUMENT, MANIFEST, SPLITS, checksum, documents_file, sealed


def digest_key(digest: bytes) -> int:
    """Return the 8 bytes of a digest that are kept beside the tokens, as a number."""
    return int.from_bytes(digest[-8:])


def save(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array whole or not at all; return its size and checksum."""
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        # np.save would not say why it could not write.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    found = {"bytes": aside.stat().st_size, "sha256": checksum(aside)}
    aside.replace(path)
    return found


def replace(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def alone(path: Path, console: Console) -> Iterator[None]:
    """Hold a lock, which the system releases however this process ends; say so if another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("waiting for another process that prepares the same tokens")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def keep_tokenizer(encoder: TextEncoder, folder: Path) -> None:
    """Write the tokenizer's files; `tokenizer_config.json` comes last."""
    aside = folder / "tokenizer.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    encoder.save(aside)
    for name in TOKENIZER_FILES:
        sync(aside / name)
        (aside / name).replace(folder / name)
    aside.rmdir()


def write_part(
    folder: Path, number: int, held: dict[str, list[tuple[Document, np.ndarray]]], encoder: TextEncoder
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write documents and their ids as one part of each split.

    Returns:
        for each split what the manifest says of the part (`file` is `None` without documents); and for each file
        written its size and checksum.
    """
    part, files = {}, {}
    for split, documents in held.items():
        file = f"{split}-{number:05}.npy" if documents else None
        ids = np.concatenate([ids for _, ids in documents]) if documents else np.empty(0, encoder.dtype)
        part[split] = {
            "file": file,
            "tokens": len(ids),
            "documents": len(documents),
            "bytes": sum(document.size for document, _ in documents),
        }
        if file:
            index = np.empty(len(documents), DOCUMENT)
            index["end"] = np.cumsum([len(ids) for _, ids in documents])
            index["digest"] = [digest_key(document.digest) for document, _ in documents]
            path = folder / file
            for place, array in ((path, ids), (documents_file(path), index)):
                files[place.name] = save(place, array)
    return part, files


def write_manifest(
    folder: Path,
    recipe: dict[str, Any],
    encoder: TextEncoder,
    parts: list[dict[str, Any]],
    files: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Write the file that makes the folder whole, and return what is in it.

    Args:
        folder: that has all other files.
        recipe: of the corpus, as it was when the work began.
        encoder: the tokenizer.
        parts: from `write_part`.
        files: from `write_part`, of all parts.
        more: facts to be added.
    """
    files = dict(files)
    for name in TOKENIZER_FILES:
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)}
    facts: dict[str, Any] = {
        "vocab_size": encoder.size,
        "end_of_text": encoder.end,
        "dtype": np.dtype(encoder.dtype).name,
        **more,
    }
    for split in SPLITS:
        there = [part[split] for part in parts if part[split]["file"]]
        totals = {key: sum(part[key] for part in there) for key in ("documents", "bytes", "tokens")}
        facts[split] = totals | {"parts": there}
    whole: list[Any] = [facts["dtype"], encoder.end, sorted((n, f["sha256"]) for n, f in files.items())]
    if "streamed" in recipe:  # the training tokens are not there to be hashed
        whole += [recipe, facts["commits"]]
    facts["fingerprint"] = hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]
    facts |= {"files": files, "recipe": recipe}
    replace(folder / MANIFEST, sealed(facts))
    return facts
