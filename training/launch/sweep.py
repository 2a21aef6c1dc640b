"""The runs of a sweep, and how each is doing."""

import fcntl
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError
from common.text import overrides_dict
from training.checkpoint.fork import origin
from training.config.checks import check, run_path
from training.run_dir import RunDir

#: Of the runs of this sweep that are done: their overrides, key to value, and results.
finished: list[tuple[dict[str, str], dict[str, Any]]] = []


class Job(NamedTuple):
    """A run of a sweep.

    Attributes:
        overrides: as on the command line.
        cfg: its configuration.
        folder: its folder.
    """

    overrides: list[str]
    cfg: DictConfig
    folder: RunDir

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.folder.path.name

    def finish(self) -> bool:
        """Whether it is done; its result is taken to `finished`."""
        result = self.folder.read_result()
        if result is not None:
            finished.append((overrides_dict(self.overrides), result))
        return result is not None


def config_search_overrides(hydra: Any) -> list[str]:
    """Return what tells another process to look for configurations where this one does.

    Args:
        hydra: Hydra's own configuration.
    """
    given = [
        f"--config-dir={source.path}" for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    return given + [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]


def compose(loader: Any, config: DictConfig, overrides: Sequence[str]) -> Job:
    """Return a run of a sweep.

    Args:
        loader: Hydra's.
        config: of the sweep.
        overrides: of the run.
    """
    cfg = loader.load_sweep_config(config, list(overrides))
    with open_dict(cfg):
        del cfg["hydra"]
    return Job(list(overrides), cfg, RunDir(run_path(cfg)))


def check_job(job: Job) -> None:
    """Raise `UserError` if anything stands against running it."""
    check(job.cfg)
    job.folder.check_same_run(job.cfg)
    if not job.folder.result.exists():
        origin(job.cfg)


class Status(NamedTuple):
    """How a run is doing.

    Attributes:
        state: done, running, waiting (in SLURM's queue), failed (it says why in failure.txt), stopped, or damaged (a
            file of its folder cannot be read).
        row: the last of metrics.jsonl; empty if there is none.
        steps: of the whole run; `None` if it has not begun.
        job: SLURM's number of its job; `None`: none, or it has ended.
    """

    state: str
    row: dict[str, Any]
    steps: int | None
    job: str | None


def status(folder: RunDir, queue: dict[str, str]) -> Status:
    """Return how a run is doing.

    Args:
        folder: of the run.
        queue: states of SLURM's jobs by their numbers.
    """
    try:
        return _status(folder, queue)
    except (UserError, ValueError, KeyError, AttributeError, yaml.YAMLError, OmegaConfBaseException):
        return Status("damaged", {}, None, None)


def _status(folder: RunDir, queue: dict[str, str]) -> Status:
    job = folder.job() if folder.job() in queue else None
    if folder.read_result() is not None:
        state = "done"
    elif _held(folder) or (job and queue[job] not in ("PENDING", "REQUEUED")):
        state = "running"
    elif job:
        state = "waiting"
    else:
        state = "failed" if folder.failure.exists() else "stopped"
    return Status(state, _last(folder), folder.max_steps(), job)


def _held(folder: RunDir) -> bool:
    """Whether a process on this machine, or on one that shares locks with it, holds a run folder."""
    if not folder.lock.exists():
        return False
    with folder.lock.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _last(folder: RunDir) -> dict[str, Any]:
    """Return the last whole line of metrics.jsonl."""
    if not folder.metrics.exists():
        return {}
    with folder.metrics.open("rb") as file:
        file.seek(max(0, folder.metrics.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else {}
