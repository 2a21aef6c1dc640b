"""Export a run as a Hugging Face model: `python scripts/export_hf.py run=runs/main/NAME [step=N] [out=FOLDER]`.

The folder has weights, configuration, tokenizer and a model card. `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load it.

    python scripts/export_hf.py run=runs/main/NAME out=my-model
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import logging
import warnings
from pathlib import Path
from typing import Annotated

from common.console import make_console
from common.errors import UserError
from common.files import atomic_folder
from common.settings import Allowed, Count, Folder, Settings, parse
from experiments.escape import escape_markdown, one_visible_line
from models.config import WeightDtype
from models.hugging_face import export
from scripts._held import held
from training.checkpoint.load import DTYPES, RunCheckpoint
from training.config.checks import check_folder

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {parameters:,} parameters with a context of {context:,} tokens, exported after {description} of its
training.

Texts were tokenized without a begin token, and each ended with `{end_token}`. The tokenizer encodes prompts in the same
way: it adds no token, and takes special tokens that are spelled out in a text for plain characters. Where an end token
is needed, append its id.
"""


class ExportConfig(Settings):
    """What configs/export_hf.yaml sets."""

    run: Folder
    """Run folder."""
    step: Count | None = None
    """Step of the checkpoint; null: the newest."""
    dtype: WeightDtype = "float32"
    """Data type of the weights that are written."""
    out: Annotated[Folder | None, Allowed("a folder, or null")] = None
    """Folder that is written, which must not exist; null: hugging_face in the run folder."""


def main(values: _entry.Values) -> None:
    """Export the checkpoint that the configuration names."""
    config = parse(ExportConfig, values)
    console = make_console()
    logging.getLogger().setLevel(logging.WARNING)  # huggingface_hub reports the temporary folder
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading needs none
    out = Path(config.run, "hugging_face") if config.out is None else Path(config.out)
    with held(Path(config.run), config.step, console.print) as checkpoint:
        if out.exists():
            raise UserError(f"out={out} exists already: remove it, or choose another folder")
        check_folder("out", str(out), out)
        state = {name: tensor.to(DTYPES[config.dtype]) for name, tensor in checkpoint.model_state().items()}
        tokenizer = checkpoint.tokenizer()
        with atomic_folder(out) as temporary:
            export(state, checkpoint.config, temporary, tokenizer.end)
            tokenizer.save(temporary)
            (temporary / "README.md").write_text(model_card(checkpoint, tokenizer.end_token))
    console.print(f"{checkpoint.description}, {checkpoint.config.parameters:,} parameters in {config.dtype}: {out}")


def model_card(checkpoint: RunCheckpoint, end_token: str) -> str:
    """Return the model card, README.md of a Hugging Face folder."""
    return CARD.format(
        name=escape_markdown(checkpoint.run_dir.path.resolve().name),
        parameters=checkpoint.config.parameters,
        description=checkpoint.description,
        context=checkpoint.config.max_position_embeddings,
        end_token=one_visible_line(end_token).replace("`", "'"),
    )


if __name__ == "__main__":
    _entry.run(main, "export_hf")
