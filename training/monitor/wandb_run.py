"""Weights & Biases as a listener of a run. wandb is imported only if it is chosen. Its failures never stop training."""

import hashlib
import re
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from common.errors import one_line
from common.files import make_dir
from common.root_cause import root_cause
from training.config.identity import run_name
from training.config.schema import Config
from training.monitor.metrics import Row

#: Seconds to wait for the server at the start and at the end of a run.
SERVER_TIMEOUT = 30


def run_id(name: str) -> str:
    """Return the identifier of a run, by experiment and name. A digest takes the place of what wandb does not allow."""
    if re.fullmatch(r"[^:;,#?/']{1,128}", name):
        return name
    allowed = re.sub(r"[:;,#?/']", "-", name)
    return f"{allowed[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class WandbRun:
    """The wandb run of a run folder. It has the folder's name, so that a resumed run continues there.

    If the server cannot be reached, the records stay in the folder, for `wandb sync`. A link in the place of their
    folder is a `UserError`.
    """

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        make_dir(folder / "wandb")
        import wandb

        self.folder = folder
        self.console = console
        self._failed = False
        try:
            self.logger = self._open(config, offline=False)
        except (wandb.errors.CommError, TimeoutError, OSError) as error:
            self._warn(error, "its records are kept")
            wandb.teardown()
            self.logger = self._open(config, offline=True)

    def _open(self, config: Config, offline: bool) -> WandbLogger:
        import wandb

        name = run_name(config)
        logger = WandbLogger(
            project=config.logger.project,
            entity=config.logger.entity,
            tags=list(config.logger.tags),
            group=config.experiment,
            name=name,
            id=run_id(f"{config.experiment}-{name}"),
            resume="allow",
            save_dir=self.folder,
            offline=offline,
            settings=wandb.Settings(init_timeout=SERVER_TIMEOUT, finish_timeout=SERVER_TIMEOUT),
        )
        logger.log_hyperparams(config.model_dump(mode="json", by_alias=True))
        return logger

    def __call__(self, step: int, numbers: Row) -> None:
        """Log the numbers of a step. The first failure is reported, and nothing is logged after it."""
        if self._failed:
            return
        try:
            self.logger.log_metrics({key: value for key, value in numbers.items() if value is not None}, step=step)
        except Exception as error:  # no failure of a logger may stop training
            self._failed = True
            self._warn(error, "its records so far are kept")

    def finish(self) -> None:
        """End the wandb run; otherwise the next job of a sweep would log into it."""
        try:
            self.logger.experiment.finish()
        except Exception as error:
            self._warn(error, "its records are kept")

    def _warn(self, error: BaseException, records: str) -> None:
        where = f"{self.folder}/wandb, for `wandb sync`"
        problem = f"WANDB CANNOT BE REACHED: {one_line(root_cause(error), 200)}"
        self.console.print(f"{problem}. Training continues; {records} in {where}.", style="bold red")
