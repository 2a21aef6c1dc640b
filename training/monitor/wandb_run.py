"""Weights & Biases as a listener to a run: loaded only where it is asked for, and never in the way of training."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from training.config.identity import run_name
from training.config.schema import Config
from training.monitor.metrics import Row

#: Seconds to wait for the server where nothing else happens meanwhile: at the start, and at the end.
PATIENCE = 30


class WandbRun:
    """The wandb run of a run folder: it has its name, so that a continued run continues there.

    Where the server cannot be reached, the run is kept in the folder, for `wandb sync`.

    Args:
        config: checked configuration.
        folder: run folder.
        console: told if anything goes wrong.
    """

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        import wandb

        self.folder = folder
        self.console = console
        try:
            self.logger = self._open(config, offline=False)
        except (wandb.errors.CommError, TimeoutError, OSError) as error:
            self._warn(error, "its records stay")
            wandb.teardown()
            self.logger = self._open(config, offline=True)
        self._lost = False

    def _open(self, config: Config, offline: bool) -> WandbLogger:
        import wandb

        name = run_name(config)
        logger = WandbLogger(
            project=config.logger.project,
            entity=config.logger.entity,
            tags=list(config.logger.tags),
            group=config.experiment,
            name=name,
            id=f"{config.experiment}-{name}"[-128:],
            resume="allow",
            save_dir=self.folder,
            offline=offline,
            settings=wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE),
        )
        logger.log_hyperparams(config.model_dump(mode="json", by_alias=True))
        return logger

    def __call__(self, row: Row) -> None:
        """Log a row of metrics.jsonl."""
        self.log({key: value for key, value in row.items() if value is not None}, int(row["step"] or 0))

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """Log numbers at a step; if that fails, say so, and leave it from then on."""
        if self._lost:
            return
        try:
            self.logger.log_metrics(numbers, step=step)
        except Exception as error:  # whatever it is, training matters more
            self._lost = True
            self._warn(error, "what it has so far stays")

    def finish(self) -> None:
        """End the wandb run, or the next job of a sweep would log into it."""
        try:
            self.logger.experiment.finish()
        except Exception as error:
            self._warn(error, "its records stay")

    def _warn(self, error: BaseException, what: str) -> None:
        reason = " ".join(str(error).split())[:200]
        self.console.print(
            f"WANDB CANNOT BE REACHED: {reason}. Training goes on; {what} in {self.folder}/wandb, for `wandb sync`.",
            style="bold red",
            markup=False,
        )
