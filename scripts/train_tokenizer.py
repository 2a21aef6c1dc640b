"""Train a byte-level BPE: `python scripts/train_tokenizer.py data.path=FOLDER vocab_size=65536 out=FOLDER`.

The folder then works as `data.tokenizer=FOLDER` and in transformers' `AutoTokenizer.from_pretrained`. Only the training
documents are used: those that `data.val_fraction` holds out are skipped.

    python scripts/train_tokenizer.py data.path=texts vocab_size=4096 out=my-tokenizer
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import math
from pathlib import Path
from typing import Annotated

from common.console import make_console
from common.errors import ConfigError, prefix_errors
from common.files import atomic_folder
from common.settings import Allowed, AtLeastOne, Count, Folder, Settings, parse
from data import CacheConfig, DataConfig, corpus_tokenizer
from training.config.checks import check_data, check_folder


class TrainTokenizerConfig(Settings):
    """Settings of configs/train_tokenizer.yaml."""

    data: DataConfig
    """Corpus to learn from."""
    vocab_size: Count
    """Number of ids; a small corpus may yield fewer."""
    max_bytes: AtLeastOne
    """Bytes of text after which reading stops."""
    out: Annotated[Folder | None, Allowed("a folder, or null")]
    """Folder that is written, which must not exist; null: tokenizers/<data.name>-<vocab_size> in `paths.cache`."""
    paths: CacheConfig
    """Folders."""


def main(values: _entry.Values) -> None:
    """Train the tokenizer and write its files."""
    config = parse(TrainTokenizerConfig, values)
    console = make_console()
    default = Path(config.paths.cache, "tokenizers", f"{config.data.name}-{config.vocab_size}")
    out = default if config.out is None else Path(config.out)
    if out.exists():
        raise ConfigError("out", out, problem="exists already: remove it, or choose another folder")
    check_folder("out", str(out), out)
    corpus = check_data(config.data, config.paths.cache, sequence_length=1)
    with prefix_errors("data"):
        tokenizer = corpus_tokenizer(corpus, console, math.floor(config.max_bytes))
    try:
        with atomic_folder(out) as temporary:
            tokenizer.save(temporary)
    except OSError as error:
        raise ConfigError("out", out, problem=f"cannot be written ({error.strerror})") from error
    note = "" if tokenizer.size == corpus.vocab_size else f" (the text has no more, of {corpus.vocab_size:,})"
    console.print(f"{tokenizer.size:,} tokens{note}: data.tokenizer={out}")


if __name__ == "__main__":
    _entry.run(main, "train_tokenizer")
