"""The runs of a sweep, and the state of each."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.errors import ConfigError
from common.text import overrides_dict
from training.checkpoint.fork import find_fork_source
from training.config.checks import check
from training.config.compose import load_config
from training.config.identity import run_path
from training.config.schema import Config
from training.run_dir import RunDir

#: Finished runs of this sweep: their overrides, key to value, and results.
completed_jobs: list[tuple[dict[str, str], dict[str, Any]]] = []


class Job(NamedTuple):
    """A run of a sweep.

    Attributes:
        overrides: as on the command line.
        config: its configuration.
        run_dir: its folder.
    """

    overrides: list[str]
    config: Config
    run_dir: RunDir

    @property
    def title(self) -> str:
        """Name of the run, for people."""
        return self.run_dir.path.name

    def collect_result(self) -> bool:
        """Add the result to `completed_jobs`; return whether the run is finished."""
        result = self.run_dir.read_result()
        if result is not None:
            completed_jobs.append((overrides_dict(self.overrides), result))
        return result is not None

    def check(self) -> None:
        """Raise `UserError` if the run cannot be started."""
        check(self.config, self.run_dir.path)
        self.run_dir.check_same_run(self.config)
        if not self.run_dir.result_file.exists():
            find_fork_source(self.config, self.run_dir)


def compose_job(loader: Any, sweep: Any, overrides: Sequence[str]) -> Job:
    """Return a run of a sweep.

    Args:
        loader: Hydra's configuration loader.
        sweep: Hydra's configuration of the sweep.
        overrides: of the run.
    """
    config = load_config(loader.load_sweep_config(sweep, list(overrides)))
    if config.resume is not None:
        raise ConfigError("resume", config.resume, problem="is not possible with -m: it continues one run")
    return Job(list(overrides), config, RunDir(run_path(config)))


def config_search_overrides(hydra: Any) -> list[str]:
    """Return the arguments with which another process looks for configurations where this one does.

    Args:
        hydra: Hydra's own configuration.
    """
    folders = [
        f"--config-dir={source.path}" for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    return folders + [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]


class Status(NamedTuple):
    """State of a run.

    Attributes:
        state: done, running, waiting (in SLURM's queue), failed (failure.txt says why), stopped, or damaged (a file
            of its folder cannot be read).
        row: last line of metrics.jsonl; empty if there is none.
        steps: of the whole run; `None` if it has not begun.
        job: number of its SLURM job in the queue; `None`: none.
    """

    state: str
    row: dict[str, Any]
    steps: int | None
    job: str | None


def status(run_dir: RunDir, queue: dict[str, str]) -> Status:
    """Return the state of a run.

    Args:
        run_dir: its folder.
        queue: states of SLURM's jobs by their numbers.
    """
    try:
        return _status(run_dir, queue)
    except ValueError:
        return Status("damaged", {}, None, None)


def _status(run_dir: RunDir, queue: dict[str, str]) -> Status:
    submitted = run_dir.slurm_job()
    job = submitted if submitted in queue else None
    if run_dir.read_result() is not None:
        state = "done"
    elif run_dir.is_owned() or (job and queue[job] not in ("PENDING", "REQUEUED")):
        state = "running"
    elif job:
        state = "waiting"
    else:
        state = "failed" if run_dir.failure_file.exists() else "stopped"
    return Status(state, _last_row(run_dir), run_dir.max_steps(), job)


def _last_row(run_dir: RunDir) -> dict[str, Any]:
    """Return the last complete line of metrics.jsonl."""
    if not run_dir.metrics_file.exists():
        return {}
    with run_dir.metrics_file.open("rb") as file:
        file.seek(max(0, run_dir.metrics_file.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else {}
