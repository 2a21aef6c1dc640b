"""The model of a run folder, as it was after one of its steps."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from common.errors import UserError
from data import Tokenizer, load_tokenizer
from models import LlamaConfig
from training.checkpoint.format import is_valid, step_of, weights
from training.config.checks import model_config
from training.run_dir import RunDir

#: In which weights can be given away.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RunCheckpoint:
    """What a run has made of its model.

    Args:
        run: its folder, as given on the command line.
        step: after which; `None`: of the newest valid checkpoint.
        say: told of damaged checkpoints that are passed over.

    Attributes:
        step: after which.
        steps: of the whole run.
        config: shape of the model.

    Raises:
        UserError: there is no such run, or it has no such checkpoint.
    """

    def __init__(self, run: Path, step: int | None, say: Callable[[str], None]) -> None:
        self.folder = RunDir(run)
        if not self.folder.config.is_file():
            raise UserError(f"run={run} is not a run folder: it must be one, with a config.yaml in it")
        self.checkpoint = self._checkpoint(step, say)
        self.step = step_of(self.checkpoint)
        cfg = OmegaConf.load(self.folder.config)
        self.steps: int = cfg.trainer.max_steps
        self.config: LlamaConfig = model_config(cfg)  # type: ignore[arg-type]

    def _checkpoint(self, step: int | None, say: Callable[[str], None]) -> Path:
        if step is None:
            found = self.folder.newest_checkpoint(say)
            if found is None:
                raise UserError(f"run={self.folder.path} has no checkpoint yet: train it first")
            return found
        there = self.folder.steps()
        if step not in there:
            raise UserError(
                f"step={step} has no checkpoint in {self.folder.checkpoints}: it must be one of "
                f"{', '.join(map(str, there)) or 'none'}"
            )
        found = self.folder.checkpoint(step)
        if not is_valid(found):
            raise UserError(f"step={step} is damaged: {found} must be restored, or another step taken")
        return found

    @property
    def told(self) -> str:
        """After which step, and of how many if it is not the last."""
        return f"step {self.step}" + ("" if self.step == self.steps else f" of {self.steps}")

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, whole and on the CPU, under the names of `Llama.state_dict()`."""
        return weights(self.checkpoint)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run.

        Raises:
            UserError: it is not there, or damaged.
        """
        try:
            return load_tokenizer(str(self.folder.tokenizer))
        except ValueError as error:
            raise UserError(
                f"run={self.folder.path} has lost its tokenizer: {self.folder.tokenizer} is not there, or damaged"
            ) from error
