"""Prepare the tokens of a corpus: `python scripts/prepare_data.py data=smollm model=1b data.tokenizer=FOLDER`.

`train.py` does the same if the tokens are missing. This script prepares them earlier or on another machine, and
compares every file of prepared tokens with its checksum. After an interruption, the same command continues. The cache
folder may be copied: with the same settings its tokens are found, whether the text is there, elsewhere, or gone.

    python scripts/prepare_data.py data.path=texts
"""

import _entry  # first: it finds the checkout and installs the signal handlers

from pathlib import Path

from rich.table import Table

from common.console import make_console
from common.errors import ConfigError, prefix_errors
from common.settings import Settings, parse
from data import CacheConfig, DataConfig, open_tokens, prepare
from models.config import ModelConfig
from training.config.checks import check_cache, check_data


class PrepareDataConfig(Settings):
    """Settings of configs/prepare_data.yaml."""

    data: DataConfig
    """Corpus to prepare."""
    model: ModelConfig
    """Model that the tokens are for; its vocabulary size is that of a trained tokenizer."""
    paths: CacheConfig
    """Folders."""


def main(values: _entry.Values) -> None:
    """Prepare the tokens and verify their checksums."""
    config = parse(PrepareDataConfig, values)
    console = make_console()
    cache = Path(config.paths.cache)
    if config.data.mode == "stream":
        raise ConfigError("data.mode", "stream", problem="is not possible: a stream has no prepared tokens")
    corpus = check_data(config.data, config.paths.cache, sequence_length=1)
    check_cache(corpus, config.paths.cache)
    with prefix_errors("data"):
        tokens = open_tokens(prepare(corpus, cache, 1, console).folder, verify=True)
    table = Table("", "training", "held out", title=f"{tokens.folder}", title_justify="left", min_width=50)
    for key in ("documents", "bytes", "tokens"):
        table.add_row(key, *(f"{tokens.facts[split][key]:,}" for split in ("train", "test")))
    console.print(table, soft_wrap=False)
    size = sum(file["bytes"] for file in tokens.facts["files"].values())
    console.print(
        f"{len(tokens.facts['files'])} files, {size / 1e6:,.1f} MB, checksums right; vocabulary "
        f"{tokens.facts['vocab_size']:,}, {tokens.facts['duplicates']:,} duplicates dropped, "
        f"fingerprint {tokens.fingerprint}"
    )


if __name__ == "__main__":
    _entry.run(main, "prepare_data")
