"""Train a byte-level BPE: `python scripts/train_tokenizer.py data.path=FOLDER vocab_size=65536 out=FOLDER`.

The folder then works as `data.tokenizer=FOLDER` and in transformers' `AutoTokenizer.from_pretrained`. It learns from
the training documents only: those that `data.val_fraction` holds out are left out here too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import math
import shutil

import hydra
from omegaconf import DictConfig
from rich.console import Console

from common.errors import UserError
from data import corpus_tokenizer
from training.config.checks import check_data, check_folder, section
from training.launch.cli import command_line, reporting
from zclip.arguments import is_number


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_tokenizer")
def main(cfg: DictConfig) -> None:
    """Train the tokenizer that the configuration describes."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False)
        out = Path(cfg.out)
        if out.exists():
            raise UserError(f"out={cfg.out} is there already: remove it, or choose another folder")
        if not is_number(cfg.max_bytes) or cfg.max_bytes < 1:
            raise UserError(f"max_bytes={cfg.max_bytes} is not allowed: it must be a number from 1")
        check_folder("out", cfg.out, out)
        corpus = check_data(cfg, sequence_length=1)
        with section("data"):
            encoder = corpus_tokenizer(corpus, console, math.floor(cfg.max_bytes))
        aside = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            encoder.save(aside)
            aside.rename(out)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"out={cfg.out} cannot be written ({error.strerror}): nothing is left there") from error
        short = "" if encoder.size == corpus.vocab_size else f" (the text has no more, of {corpus.vocab_size:,})"
        console.print(f"{encoder.size:,} tokens{short}: data.tokenizer={out}")


if __name__ == "__main__":
    sys.exit(command_line(main))
