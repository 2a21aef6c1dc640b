"""A run as a Hugging Face model: `python scripts/export_hf.py run=runs/main/NAME [step=N] [out=FOLDER]`.

The folder has weights, configuration and tokenizer, and is what `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import logging
import shutil
import warnings

import hydra
from omegaconf import DictConfig
from rich.console import Console

from common.errors import UserError
from models.hugging_face import export
from training.checkpoint.load import DTYPES, RunCheckpoint
from training.config.checks import check_folder
from training.launch.cli import command_line, reporting


@hydra.main(version_base="1.3", config_path="../configs", config_name="export_hf")
def main(cfg: DictConfig) -> None:
    """Export the checkpoint that the configuration names."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False)
        logging.getLogger().setLevel(logging.WARNING)  # the hub's library names the folder aside
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it reads without
        out = Path(cfg.out)
        if cfg.dtype not in DTYPES:
            raise UserError(f"dtype={cfg.dtype} is not allowed: it must be one of {', '.join(DTYPES)}")
        trained = RunCheckpoint(Path(cfg.run), cfg.step, say=console.print)
        if out.exists():
            raise UserError(f"out={cfg.out} is there already: remove it, or choose another folder")
        check_folder("out", cfg.out, out)
        state = {name: tensor.to(DTYPES[cfg.dtype]) for name, tensor in trained.weights().items()}
        aside = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer = trained.tokenizer()
        export(state, trained.config, aside, tokenizer.end)
        tokenizer.save(aside)
        aside.rename(out)
        console.print(f"{trained.told}, {trained.config.parameters:,} parameters in {cfg.dtype}: {out}")


if __name__ == "__main__":
    sys.exit(command_line(main))
