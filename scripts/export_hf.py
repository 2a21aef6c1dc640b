"""A run as a Hugging Face model: `python scripts/export_hf.py run=runs/main/NAME [step=N] [out=FOLDER]`.

The folder has weights, configuration and tokenizer, and is what `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load.
"""

import logging
import shutil
import sys
import warnings
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import load_tokenizer
from models.hugging_face import export
from training.checkpoint_files import step_of, undamaged, weights
from training.cli import command_line, reporting
from training.config import ConfigError, check_folder, model_config
from training.folder import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@hydra.main(version_base="1.3", config_path="../configs", config_name="export_hf")
def main(cfg: DictConfig) -> None:
    """Export the checkpoint that the configuration names."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False)
        logging.getLogger().setLevel(logging.WARNING)  # the hub's library names the folder aside
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it reads without
        folder, out = RunFolder(Path(cfg.run)), Path(cfg.out)
        if not folder.config.is_file():
            raise ConfigError(f"run={cfg.run} is not a run folder: it must be one, with a config.yaml in it")
        if cfg.dtype not in DTYPES:
            raise ConfigError(f"dtype={cfg.dtype} is not allowed: it must be one of {', '.join(DTYPES)}")
        if out.exists():
            raise ConfigError(f"out={cfg.out} is there already: remove it, or choose another folder")
        check_folder("out", cfg.out, out)
        checkpoint = _checkpoint(folder, cfg.step, console)
        config = model_config(OmegaConf.load(folder.config))  # type: ignore[arg-type]
        state = {name: tensor.to(DTYPES[cfg.dtype]) for name, tensor in weights(checkpoint).items()}
        aside = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer = load_tokenizer(str(folder.tokenizer))
        export(state, config, aside, tokenizer.end)
        tokenizer.save(aside)
        aside.rename(out)
        steps, last = OmegaConf.load(folder.config).trainer.max_steps, step_of(checkpoint)
        told = f"step {last}" + ("" if last == steps else f" of {steps}")
        console.print(f"{told}, {config.parameters:,} parameters in {cfg.dtype}: {out}")


def _checkpoint(folder: RunFolder, step: int | None, console: Console) -> Path:
    """Return the checkpoint of a step, or the newest that is undamaged."""
    there = {step: folder.checkpoint(step) for step in folder.steps()}
    if step is not None and step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise ConfigError(f"step={step} has no checkpoint in {folder.checkpoints}: it must be one of {steps}")
    if step is not None and not undamaged(there[step]):
        raise ConfigError(f"step={step} is damaged: {there[step]} must be restored, or another step exported")
    found = there[step] if step is not None else folder.newest_checkpoint(say=console.print)
    if found is None:
        raise ConfigError(f"run={folder.path} has no checkpoint yet: train it first")
    return found


if __name__ == "__main__":
    sys.exit(command_line(main))
