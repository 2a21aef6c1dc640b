"""The runs of a sweep: their checks before the first one starts, the state of each, and what they need together."""

import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from rich.table import Table

from common.console import make_console
from common.errors import EXIT_USER_ERROR, ConfigError, UserError
from common.reading import MOST_LINE, open_regular, parse_record
from common.run_files import MetricsLine, as_dict
from common.text import overrides_dict
from training.checkpoint.fork import find_fork_source, fork_folder
from training.checkpoint.saved_config import check_same_run
from training.config.checks import check, check_batch
from training.config.compose import CONFIGS, load_config
from training.config.identity import run_path
from training.config.schema import Config
from training.launch.cli import exit_statuses, reporting
from training.launch.plan import GIB, plan, steps_done
from training.launch.slurm_queue import sbatch_resources
from training.run_dir import RunDir
from training.runtime.hardware import peak_flops


class CompletedJob(NamedTuple):
    """A finished run of a sweep: its overrides, key to value, its result and its folder."""

    overrides: dict[str, str]
    result: dict[str, Any]
    path: Path


#: Finished runs of this sweep.
completed_jobs: list[CompletedJob] = []


class Job(NamedTuple):
    """A run of a sweep, with its overrides as on the command line."""

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
            completed_jobs.append(CompletedJob(overrides_dict(self.overrides), result, self.run_dir.path))
        return result is not None

    def check(self, *, elsewhere: bool = False, before: Collection[Path] = ()) -> None:
        """Raise `UserError` if the run cannot be started here, or `elsewhere`.

        `before` are folders of runs that the sweep finishes first: a fork of one is checked when that is done.
        """
        check(self.config, self.run_dir.path, elsewhere=elsewhere)
        check_same_run(self.run_dir, self.config)
        source = fork_folder(self.config, self.run_dir)
        is_later = source is not None and source in before and not RunDir(source).result_file.exists()
        if not (self.run_dir.result_file.exists() or is_later):
            find_fork_source(self.config, self.run_dir)


def compose_job(loader: Any, sweep: Any, overrides: Sequence[str]) -> Job:
    """Return a run of a sweep, from Hydra's configuration loader and its configuration of the sweep."""
    config = load_config(loader.load_sweep_config(sweep, list(overrides)), overrides)
    if config.resume is not None:
        raise ConfigError("resume", config.resume, problem="is not possible with -m: it continues one run")
    return Job(list(overrides), config, RunDir(run_path(config)))


class CheckSweep(Callback):
    """Hydra callback: compose and check all jobs of a sweep, so that a bad one stops it before any work.

    Sweepers that choose values as they go, such as Optuna's, have no list of jobs: each job is checked when it runs.
    """

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Check each combination of the sweep's overrides; exit with status 2 at the first error."""
        with reporting():
            sweeper: Any = get_class(config.hydra.sweeper._target_)
            loader: Any = GlobalHydra.instance().config_loader()
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(config.hydra.overrides.task)
            if hasattr(sweeper, "compose_batches"):
                _check_jobs(config, *sweeper.compose_batches(loader, config, overrides))
            elif hasattr(sweeper, "split_arguments"):
                (jobs,) = sweeper.split_arguments(overrides, max_batch_size=None)
                _check_jobs(config, [compose_job(loader, config, job) for job in jobs])
        if EXIT_USER_ERROR in exit_statuses:
            sys.exit(EXIT_USER_ERROR)  # Hydra continues after other exceptions of a callback


def _check_jobs(sweep: Any, *batches: list[Job]) -> None:
    """Raise `UserError` if a job cannot be started, or two jobs share a run folder.

    The jobs of a batch begin when all of the batches before are finished.
    """
    jobs = [job for batch in batches for job in batch]
    if not jobs:
        raise UserError(f"{' '.join(sweep.hydra.overrides.task)} makes no job: a value must match something")
    elsewhere = sweep.hydra.launcher._target_.endswith(".Slurm")  # a login node has no GPU
    seen: dict[Path, list[str]] = {}
    before = {job.run_dir.path for batch in batches[:-1] for job in batch}
    for job in jobs:
        job.check(elsewhere=elsewhere, before=before)
        path = job.run_dir.path
        if path in seen and job.config.name is None and sweep.paper.suite is None:
            raise UserError(f"two jobs of the sweep are the same run, {path}: give each value once")
        if path in seen and job.config.name is not None:
            raise _shared_name(job.config.name, seen[path], job.overrides)
        seen[path] = job.overrides
    if not elsewhere:
        _check_tasks(jobs)


def _check_tasks(jobs: Sequence[Job]) -> None:
    """Load the tasks on which runs are evaluated while they train, once for equal settings, and drop them again.

    Each run would raise the same error for them. A run that is finished, or only planned, needs none.
    """
    from training.validation.tasks import load_run_tasks

    begun = [job.config for job in jobs if not job.run_dir.result_file.exists()]
    scored = [config for config in begun if config.trainer.eval_every and not (config.plan or config.print_run_dir)]
    for config in {(config.eval.model_dump_json(), config.paths.cache): config for config in scored}.values():
        load_run_tasks(config)


def _shared_name(name: str, *jobs: Sequence[str]) -> UserError:
    """Return the error of two jobs with one name, which names the overrides in which they differ."""
    common = {*jobs[0]} & {*jobs[1]}
    ours, theirs = (" ".join(override for override in job if override not in common) or "no other" for job in jobs)
    if {*jobs[0]} == {*jobs[1]}:
        return UserError(f"name={name} would be shared by two jobs of the same overrides: give each value once")
    return UserError(
        f"name={name} would be shared by the jobs with ({ours}) and ({theirs}): omit the name, and each gets its own"
    )


def config_search_overrides(hydra: Any) -> list[str]:
    """Return the arguments with which another process composes the configuration that this one does, by Hydra's own."""
    sources = hydra.runtime.config_sources
    chosen = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    chosen += [f"--config-path={s.path}" for s in sources if s.provider == "main" and Path(s.path) != CONFIGS]
    chosen += [f"--config-name={hydra.job.config_name}"] if hydra.job.config_name != "train" else []
    return chosen + [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]


def print_plans(jobs: Sequence[Job], search_overrides: Sequence[str], options: Sequence[str] = ()) -> None:
    """Print the plans of a sweep's runs, and the lines that submit those that are not finished.

    The lines have these options of sbatch, and end with `config_search_overrides`.

    Raises:
        ConfigError: the processes of a run cannot share its batch. The lines must run as they are.
    """
    for job in jobs:
        check_batch(job.config.trainer)
    hardware = jobs[0].config.hardware
    total_tokens = total_hours = 0.0
    peak = peak_flops(hardware.device)
    assert peak is not None  # `HardwareConfig` checks it
    table = Table(title=f"{len(jobs)} runs, computed for {hardware.mfu:.0%} MFU", title_justify="left")
    for column in ("run", "steps", "tokens", f"hours of {hardware.device}", "GiB on each"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    done = [steps_done(job.config, job.run_dir) for job in jobs]
    for job, steps in zip(jobs, done, strict=True):
        needed, devices = plan(job.config, steps), job.config.trainer.world_size
        tokens = needed.tokens_per_step * needed.steps
        hours = devices * needed.hours(devices, peak, job.config.hardware.mfu)
        total_tokens, total_hours = total_tokens + tokens, total_hours + hours
        cells = (f"{needed.steps:,}", f"{tokens / 1e9:,.3g}B", f"{hours:,.3g}", f"{needed.bytes / GIB:,.1f}")
        table.add_row(job.title, *cells)
    table.add_section()
    table.add_row("all", "", f"{total_tokens / 1e9:,.4g}B", f"{total_hours:,.4g}", "")
    console = make_console()
    console.print(table, soft_wrap=False)
    if any(done):
        console.print("steps before a fork, and steps that are trained already, are not counted")
    if lines := _sbatch_lines(jobs, search_overrides, options):
        console.print("\n".join(lines))


def _sbatch_lines(jobs: Sequence[Job], search_overrides: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return lines for a shell that submit the unfinished jobs, each after the job from which it begins."""
    unfinished = {job.run_dir.path: job for job in jobs if not job.run_dir.result_file.exists()}
    after = {path: fork_folder(job.config, job.run_dir) for path, job in unfinished.items()}
    bases = dict.fromkeys(base for base in after.values() if base in unfinished)
    variables: dict[Path | None, str] = {base: f"job{number}" for number, base in enumerate(bases, 1)}
    lines = []
    for path, job in sorted(unfinished.items(), key=lambda item: item[0] not in variables):
        overrides = [override for override in job.overrides if not override.lstrip("+").startswith("plan=")]
        resources = [*sbatch_resources(job.config.trainer), *options]
        line = shlex.join([*resources, "scripts/slurm/train.sbatch", *overrides, *search_overrides])
        if (number := variables.get(after[path])) is not None:
            line = f"--dependency=afterok:${{{number}%%;*}} --kill-on-invalid-dep=yes {line}"
        lines.append(f"{variables[path]}=$(sbatch --parsable {line})" if path in variables else f"sbatch {line}")
    return lines


class Status(NamedTuple):
    """State of a run, with the last line of metrics.jsonl, the steps of the whole run, and its SLURM job in the queue.

    States are done, running, waiting (in SLURM's queue), failed (failure.txt says why), stopped, or damaged (a file of
    its folder cannot be read).
    """

    state: str
    row: dict[str, Any]
    steps: int | None
    job: str | None


def status(run_dir: RunDir, queue: dict[str, str]) -> Status:
    """Return the state of a run, by its folder and the states of SLURM's jobs by their numbers."""
    try:
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
    except (OSError, ValueError):  # a file of another shape, or something else in its place
        return Status("damaged", {}, None, None)


def _last_row(run_dir: RunDir) -> dict[str, Any]:
    """Return the last complete line of metrics.jsonl; raise `ValueError` if it is no line of metrics."""
    if not run_dir.metrics_file.exists():
        return {}
    with open_regular(run_dir.metrics_file) as file:
        start = size = os.fstat(file.fileno()).st_size
        lines: list[bytes] = []
        while start and len(lines) < 2 and size - start < MOST_LINE:  # a line may be longer than what is read first
            start = max(0, 2 * start - size - 4096)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")[:-1]
    return as_dict(parse_record(MetricsLine, lines[-1])) if lines else {}
