"""The model of a run folder, as it was after one of its steps."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError, UserError
from data import Tokenizer, load_tokenizer
from training.checkpoint.format import is_valid, load_model_state, step_of
from training.checkpoint.resume import newest_checkpoint
from training.config.compose import read_config
from training.run_dir import RunDir

#: Data types in which weights can be exported and evaluated.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RunCheckpoint:
    """A checkpoint of a run, with the shape of its model and its tokenizer.

    Args:
        run: run folder, as given on the command line.
        step: after which; `None`: of the newest valid checkpoint.
        report: called with a sentence about each damaged checkpoint that is skipped.

    Attributes:
        step: after which it was saved.
        max_steps: of the whole run.
        config: shape of the model.

    Raises:
        UserError: there is no such run, or it has no such checkpoint.
    """

    def __init__(self, run: Path, step: int | None, report: Callable[[str], None]) -> None:
        self.run_dir = RunDir(run)
        if not self.run_dir.config_file.is_file():
            problem = "is not a run folder: it must be one, with a config.yaml in it"
            raise ConfigError("run", run, problem=problem)
        self.checkpoint = self._checkpoint(step, report)
        self.step = step_of(self.checkpoint)
        config = read_config(self.run_dir.config_file)
        self.max_steps = config.trainer.max_steps
        self.config = config.model.llama

    def _checkpoint(self, step: int | None, report: Callable[[str], None]) -> Path:
        if step is None:
            newest = newest_checkpoint(self.run_dir, report)
            if newest is None:
                raise ConfigError("run", self.run_dir.path, problem="has no checkpoint yet: train it first")
            return newest
        saved = self.run_dir.checkpoint_steps()
        if step not in saved:
            names = ", ".join(map(str, saved)) or "none"
            problem = f"has no checkpoint in {self.run_dir.checkpoints}: it must be one of {names}"
            raise ConfigError("step", step, problem=problem)
        checkpoint = self.run_dir.checkpoint(step)
        if not is_valid(checkpoint):
            problem = f"is damaged: {checkpoint} must be restored, or another step taken"
            raise ConfigError("step", step, problem=problem)
        return checkpoint

    @property
    def description(self) -> str:
        """The step, and the number of steps of the run if it is not the last."""
        return f"step {self.step}" + ("" if self.step == self.max_steps else f" of {self.max_steps}")

    def model_state(self) -> dict[str, Tensor]:
        """Return the full weights on the CPU, under the names of `Llama.state_dict()`."""
        return load_model_state(self.checkpoint)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run.

        Raises:
            UserError: it is missing, or damaged.
        """
        try:
            return load_tokenizer(str(self.run_dir.tokenizer))
        except ValueError as error:
            folder = self.run_dir.tokenizer
            raise UserError(
                f"run={self.run_dir.path} has lost its tokenizer: {folder} is missing, or damaged"
            ) from error
