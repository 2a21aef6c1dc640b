"""The model of a run folder, as it was after one of its steps."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError, UserError
from data import Tokenizer, read_tokenizer
from training.checkpoint.format import load_model_state
from training.checkpoint.resume import newest_step
from training.checkpoint.saved_config import agreed_config, checkpoint_config, why_no_checkpoint
from training.checkpoint.state import find_problem
from training.run_dir import RunDir

#: Data types in which weights can be exported and evaluated.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RunCheckpoint:
    """A checkpoint of a run folder, with the shape of its model and its tokenizer.

    `step=None` loads the newest valid one, and `report` gets a sentence about each damaged one.

    Raises:
        UserError: there is no such run, it has no such checkpoint, or config.yaml says what it was not trained with.
    """

    def __init__(self, run: Path, step: int | None, report: Callable[[str], None]) -> None:
        self.run_dir = RunDir(run)
        saved = self.run_dir.checkpoint_steps()
        if not (self.run_dir.config_file.is_file() or saved):
            raise ConfigError("run", run, problem="is not a run folder: it must be one, with a config.yaml in it")
        if not saved:
            raise ConfigError("run", self.run_dir.path, problem=why_no_checkpoint(self.run_dir))
        if step is None:
            step = newest_step(self.run_dir, report)
            assert step is not None, "newest_step raises if all are damaged"
        elif step not in saved:
            names = ", ".join(map(str, saved))
            missing = f"has no checkpoint in {self.run_dir.checkpoints}: it must be one of {names}"
            raise ConfigError("step", step, problem=missing)
        elif problem := find_problem(self.run_dir.checkpoint(step)):
            advice = f"{self.run_dir.checkpoint(step)} must be restored, or another step taken"
            raise ConfigError("step", step, problem=f"{problem}: {advice}")
        self.step = step
        self.checkpoint = self.run_dir.checkpoint(step)
        config = checkpoint_config(self.checkpoint)
        if self.run_dir.config_file.is_file():
            agreed_config(self.run_dir, config)
        self.max_steps = config.trainer.max_steps  # of the whole run
        self.config = config.model.llama

    @property
    def description(self) -> str:
        """The step, and the number of steps of the run if it is not the last."""
        return f"step {self.step}" + ("" if self.step == self.max_steps else f" of {self.max_steps}")

    def model_state(self) -> dict[str, Tensor]:
        """Return the full weights on the CPU, under the names of `Llama.state_dict()`."""
        return load_model_state(self.checkpoint)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run. If it is missing, damaged or another one, that is a `UserError`."""
        folder = self.run_dir.tokenizer
        self.run_dir.check_tokenizer()
        try:
            return read_tokenizer(folder)
        except ValueError as error:
            raise UserError(
                f"run={self.run_dir.path} has lost its tokenizer: {folder} is missing, or damaged"
            ) from error
