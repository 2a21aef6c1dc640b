"""Export a run as a Hugging Face model: `python scripts/export_hf.py run=runs/main/NAME [step=N] [out=FOLDER]`.

The folder has weights, configuration and tokenizer. `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load it.
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import logging
import shutil
import warnings
from pathlib import Path

from rich.console import Console

from common.errors import UserError
from common.files import tmp_path
from common.settings import Count, Folder, Settings, parse
from models.config import WeightDtype
from models.hugging_face import export
from training.checkpoint.load import DTYPES, RunCheckpoint
from training.config.checks import check_folder


class ExportConfig(Settings):
    """What configs/export_hf.yaml sets."""

    run: Folder
    """Run folder."""
    step: Count | None = None
    """Step of the checkpoint; null: the newest."""
    dtype: WeightDtype = "float32"
    """Data type of the weights that are written."""
    out: Folder
    """Folder that is written. It must not exist."""


def main(values: _entry.Values) -> None:
    """Export the checkpoint that the configuration names."""
    config = parse(ExportConfig, values)
    console = Console(soft_wrap=True, highlight=False)
    logging.getLogger().setLevel(logging.WARNING)  # huggingface_hub reports the temporary folder
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading needs none
    out = Path(config.out)
    checkpoint = RunCheckpoint(Path(config.run), config.step, console.print)
    if out.exists():
        raise UserError(f"out={out} exists already: remove it, or choose another folder")
    check_folder("out", config.out, out)
    state = {name: tensor.to(DTYPES[config.dtype]) for name, tensor in checkpoint.model_state().items()}
    temporary = tmp_path(out)
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = checkpoint.tokenizer()
    export(state, checkpoint.config, temporary, tokenizer.end)
    tokenizer.save(temporary)
    temporary.rename(out)
    console.print(f"{checkpoint.description}, {checkpoint.config.parameters:,} parameters in {config.dtype}: {out}")


if __name__ == "__main__":
    _entry.run(main, "export_hf")
