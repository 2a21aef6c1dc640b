"""Prepare the tokens of a corpus: `python scripts/prepare_data.py data=smollm model=1b data.tokenizer=FOLDER`.

`train.py` does it on its own when they are missing; this is for doing it before, on another machine, or to check what
is there: every file of finished tokens is compared with its checksum. Interrupted, the same command continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from data import open_tokens, prepare
from training.config.checks import check_data, check_folder, section
from training.launch.cli import command_line, reporting


@hydra.main(version_base="1.3", config_path="../configs", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    """Prepare and check what the configuration describes."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False)
        cache = Path(cfg.paths.cache)
        check_folder("paths.cache", cfg.paths.cache, cache)
        if cfg.data.mode == "stream":
            raise UserError("data.mode=stream keeps no tokens: to prepare them it must be prepared")
        corpus = check_data(cfg, sequence_length=1)
        with section("data"):
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
    sys.exit(command_line(main))
