"""Train a byte-level BPE: `python scripts/train_tokenizer.py data.path=FOLDER vocab_size=65536 out=FOLDER`.

The folder then works as `data.tokenizer=FOLDER` and in transformers' `AutoTokenizer.from_pretrained`. Only the training
documents are used: those that `data.val_fraction` holds out are skipped.
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import math
from pathlib import Path

from common.console import make_console
from common.errors import ConfigError, prefix_errors
from common.files import atomic_folder
from common.settings import AtLeastOne, Count, Folder, Settings, parse
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
    out: Folder
    """Folder that is written. It must not exist."""
    paths: CacheConfig
    """Folders."""


def main(values: _entry.Values) -> None:
    """Train the tokenizer and write its files."""
    config = parse(TrainTokenizerConfig, values)
    console = make_console()
    out = Path(config.out)
    if out.exists():
        raise ConfigError("out", config.out, problem="exists already: remove it, or choose another folder")
    check_folder("out", config.out, out)
    corpus = check_data(config.data, config.paths.cache, sequence_length=1)
    with prefix_errors("data"):
        tokenizer = corpus_tokenizer(corpus, console, math.floor(config.max_bytes))
    try:
        with atomic_folder(out) as temporary:
            tokenizer.save(temporary)
    except OSError as error:
        raise ConfigError("out", config.out, problem=f"cannot be written ({error.strerror})") from error
    note = "" if tokenizer.size == corpus.vocab_size else f" (the text has no more, of {corpus.vocab_size:,})"
    console.print(f"{tokenizer.size:,} tokens{note}: data.tokenizer={out}")


if __name__ == "__main__":
    _entry.run(main, "train_tokenizer")
