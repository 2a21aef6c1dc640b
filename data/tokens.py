"""Tokens prepared once: tokenizer and token arrays in a cache folder named by what they were made from.

The folder is written aside and renamed when complete, so it is there whole or not at all, and two runs that
prepare the same thing at once end up with one copy.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.corpus import Document, read_documents, split_documents
from data.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, train_tokenizer

LAYOUT = 1  # of the cache folder; part of the fingerprint


class Tokens(NamedTuple):
    """A prepared corpus.

    Attributes:
        train: (tokens,) memory-mapped ids, each document followed by end-of-text.
        test: the same for the held-out documents.
        fingerprint: hash of documents, split and tokenizer settings.
        folder: where `train.npy`, `test.npy`, `tokenizer.json` and `tokens.json` lie.
        facts: contents of `tokens.json`: documents, bytes and tokens of either split, vocabulary.
    """

    train: np.ndarray
    test: np.ndarray
    fingerprint: str
    folder: Path
    facts: dict


def prepare(
    path: str | None,
    vocab_size: int,
    test_fraction: float,
    sequence_length: int,
    cache: Path,
    say: Callable[[str], None] = print,
) -> Tokens:
    """Return the tokens of a corpus, from the cache where they are, else tokenizing and keeping them.

    Args:
        path: see `read_documents`.
        vocab_size: size of the tokenizer trained on the training documents.
        test_fraction: see `split_documents`.
        sequence_length: tokens per training sequence; only checked, not part of what is cached.
        cache: folder that holds one folder per fingerprint.
        say: told, in a sentence, about work that takes time.

    Raises:
        ValueError: the corpus cannot be read, or is too short for one sequence. Nothing has been written then.
    """
    train, test = check_text(path, vocab_size, test_fraction, sequence_length)
    recipe = {
        "layout": LAYOUT,
        "train": [document.digest for document in train],
        "test": [document.digest for document in test],
        "vocab_size": vocab_size,
        "tokenizers": version("tokenizers"),
    }
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"tokens-{fingerprint}"
    if not folder.is_dir():
        _build(folder, fingerprint, train, test, vocab_size, sequence_length, say)
    try:
        facts = json.loads((folder / "tokens.json").read_text())
        arrays = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "test")}
    except (OSError, ValueError) as error:
        raise ValueError(f"the prepared tokens in {folder} are damaged ({error}): remove that folder") from error
    for split, tokens in arrays.items():
        if sequence_length >= len(tokens):
            raise ValueError(_too_long(sequence_length, f"the {split} text has {len(tokens):,} tokens"))
    return Tokens(arrays["train"], arrays["test"], fingerprint, folder, facts)


def check_text(
    path: str | None, vocab_size: int, test_fraction: float, sequence_length: int
) -> tuple[list[Document], list[Document]]:
    """Read a corpus and find what can be wrong with it before it is tokenized. Writes nothing.

    Takes the arguments of `prepare`.

    Returns:
        Training and test documents, each ordered by digest, so that tokens do not depend on file names.

    Raises:
        ValueError: the corpus cannot be read, a sequence is longer than its bytes, or the vocabulary cannot hold
            all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        allowed = f"it must be at least {SMALLEST_VOCABULARY}, all bytes and {END_OF_TEXT}"
        raise ValueError(f"vocab_size={vocab_size} is not allowed: {allowed}")
    train, test = split_documents(read_documents(path), test_fraction)
    for split, held in (("training", train), ("test", test)):
        size = sum(len(document.text.encode()) for document in held)
        if sequence_length >= size + len(held):
            raise ValueError(_too_long(sequence_length, f"the {split} text has {size:,} bytes"))
    return tuple(sorted(held, key=lambda document: document.digest) for held in (train, test))  # type: ignore[return-value]


def _build(
    folder: Path,
    fingerprint: str,
    train: list[Document],
    test: list[Document],
    vocab_size: int,
    sequence_length: int,
    say: Callable[[str], None],
) -> None:
    say(f"training a byte-level BPE of {vocab_size:,} tokens on {len(train)} documents, once")
    tokenizer = train_tokenizer((document.text for document in train), vocab_size)
    facts = {"fingerprint": fingerprint, "vocab_size": tokenizer.get_vocab_size()}
    arrays = {}
    for split, documents in (("train", train), ("test", test)):
        tokens = encode(tokenizer, documents)
        if sequence_length >= len(tokens):
            raise ValueError(_too_long(sequence_length, f"the {split} text has {len(tokens):,} tokens"))
        arrays[split] = tokens
        facts[split] = {
            "documents": len(documents),
            "bytes": sum(len(document.text.encode()) for document in documents),
            "tokens": len(tokens),
        }
    say(f"tokenized {len(arrays['train']):,} tokens for training, {len(arrays['test']):,} held out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".preparing-{fingerprint}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        tokenizer.save(str(aside / "tokenizer.json"))
        for split, tokens in arrays.items():
            np.save(aside / f"{split}.npy", tokens)
        (aside / "tokens.json").write_text(json.dumps(facts, indent=1))
        for file in aside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Return the ids of all documents in order, each followed by end-of-text: (tokens,) uint16 or uint32."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.encode_special_tokens = True  # a document that spells out the end-of-text token does not end there
    encoded = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, end], dtype=dtype) for encoding in encoded])


def _too_long(sequence_length: int, held: str) -> str:
    return (
        f"sequence_length={sequence_length} is longer than the text: {held}, "
        "and one sequence needs sequence_length + 1 tokens"
    )
