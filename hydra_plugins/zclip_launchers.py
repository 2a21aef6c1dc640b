"""Hydra launchers of a sweep: several runs at a time on this machine, or each run as a SLURM job.

Every run is `train.py` with its overrides, in a process or job of its own. Finished runs are not repeated, and jobs in
SLURM's queue are not submitted again. Hydra loads this file with every command, so slow imports are local.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

#: Seconds for which squeue may fail while a sweep waits: SLURM's controller may be restarting.
SQUEUE_TIMEOUT = 600


class _SweepLauncher(Launcher):
    """Base of both launchers."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from training.launch.sweep import config_search_overrides

        self.loader = hydra_context.config_loader
        self.config = config
        self.search_overrides = config_search_overrides(config.hydra)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from common.errors import RunError
        from training.launch.sweep import compose_job

        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # sweepers may write there
        jobs = [compose_job(self.loader, self.config, overrides) for overrides in job_overrides]
        unfinished = [job for job in jobs if not job.collect_result()]
        if len(jobs) > len(unfinished):
            print(f"{len(jobs) - len(unfinished)} of {len(jobs)} are finished already")
        failed = self.run(list({job.run_dir.path: job for job in unfinished}.values()))  # equal jobs are one run
        if failed:
            raise RunError(f"{len(failed)} of {len(jobs)} runs have not finished: {', '.join(failed)}")
        return [_job_return(job) for job in jobs]

    def run(self, jobs: list[Any]) -> list[str]:
        """Run the jobs, and return a description of each that has not finished."""
        raise NotImplementedError


def _job_return(job: Any) -> JobReturn:
    """Return what `train.py`'s main returns: the test loss, or `None` if the run was submitted only."""
    result = job.run_dir.read_result()
    value = None if result is None else result["test_loss"]
    return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=value)


def _check_n_jobs(n_jobs: Any) -> None:
    from common.errors import ConfigError

    if type(n_jobs) is not int or n_jobs < 1:
        raise ConfigError("hydra.launcher.n_jobs", n_jobs, "an integer from 1")


def _exit_reason(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _print_failure(job: Any, description: str) -> None:
    reason = job.run_dir.failure_reason()
    print(f"failed {description}" + ("" if reason is None else f": {reason}"))


class Local(_SweepLauncher):
    """Runs on this machine, several at a time.

    Args:
        n_jobs: number of runs at a time.
    """

    def __init__(self, n_jobs: int) -> None:
        _check_n_jobs(n_jobs)
        self.n_jobs = n_jobs

    def run(self, jobs: list[Any]) -> list[str]:
        """Run the jobs, each with its output in log.txt of its run folder. Signals are forwarded to them."""
        from training.runtime.signals import Interrupted, override_handler

        running: list[tuple[Any, subprocess.Popen[bytes]]] = []
        failed: list[str] = []
        received: list[int] = []

        def forward(signum: int) -> None:
            received.append(signum)
            for _, process in running:
                process.send_signal(signum)

        waiting = list(jobs)
        with override_handler(forward):
            while running or (waiting and not received):
                if waiting and not received and len(running) < self.n_jobs:
                    job = waiting.pop(0)
                    process = self._start(job)
                    running.append((job, process))
                    if received:  # the signal came before the process was in the list
                        process.send_signal(received[-1])
                    print(f"started {job.title} ({job.run_dir.log_file})")
                time.sleep(0.1)
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    if job.collect_result():
                        print(f"finished {job.title}, {len(waiting) + len(running)} left")
                    elif not received:
                        failed.append(f"{job.title} ({_exit_reason(process.returncode)}, {job.run_dir.log_file})")
                        _print_failure(job, failed[-1])
        if received:
            raise Interrupted(received[0])
        return failed

    def _start(self, job: Any) -> subprocess.Popen[bytes]:
        from training.launch.processes import child_environment

        job.run_dir.path.mkdir(parents=True, exist_ok=True)
        with job.run_dir.log_file.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-u", sys.argv[0], *job.overrides, *self.search_overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(self.n_jobs),
                start_new_session=True,
            )


class Slurm(_SweepLauncher):
    """Each run as a job of scripts/slurm/train.sbatch, on `trainer.nodes` nodes with `trainer.devices` tasks each.

    Args:
        time: time limit of a job, as sbatch takes it. Before it, the run saves and the job is requeued.
        signal_seconds: seconds between the signal to save and the time limit.
        partition, account, qos: options of sbatch; `None`: the cluster's default.
        cpus_per_task: CPUs of each task; `None`: the cluster's default.
        options: further options of sbatch, such as `[--constraint=h100]`.
        n_jobs: number of jobs in the queue at a time; `None`: all.
        wait: whether to wait for the jobs.
        poll_seconds: seconds between two calls of squeue.
    """

    def __init__(
        self,
        time: str,
        signal_seconds: int,
        partition: str | None,
        account: str | None,
        qos: str | None,
        cpus_per_task: int | None,
        options: Sequence[str],
        n_jobs: int | None,
        wait: bool,
        poll_seconds: float,
    ) -> None:
        from common.errors import ConfigError

        if n_jobs is not None:
            _check_n_jobs(n_jobs)
        if n_jobs is not None and not wait:
            problem = "is not possible with hydra.launcher.wait=false: it must be null"
            raise ConfigError("hydra.launcher.n_jobs", n_jobs, problem=problem)
        values = {"partition": partition, "account": account, "qos": qos, "cpus-per-task": cpus_per_task, "time": time}
        self.options = [f"--{name}={value}" for name, value in values.items() if value is not None]
        self.options += [f"--signal=USR1@{signal_seconds}", *options]
        self.n_jobs = n_jobs
        self.wait = wait
        self.poll_seconds = poll_seconds

    def run(self, jobs: list[Any]) -> list[str]:
        """Submit the jobs that are not in the queue, wait for all, and describe those that have not finished."""
        from common.errors import UserError
        from training.launch.slurm_queue import queued_jobs
        from training.launch.sweep import status

        queue = queued_jobs()
        waiting = sorted(jobs, key=lambda job: job.run_dir.slurm_job() not in queue)
        submitted: list[Any] = []
        failed: list[str] = []
        printed: dict[str, str] = {}
        answered = time.monotonic()
        while waiting or submitted:
            while waiting and (self.n_jobs is None or len(submitted) < self.n_jobs):
                submitted.append(waiting.pop(0))
                self._submit(submitted[-1], queue)
            if not self.wait:
                print("run make status to see their states")
                break
            time.sleep(self.poll_seconds)
            try:
                queue = queued_jobs()
            except UserError:
                if time.monotonic() - answered > SQUEUE_TIMEOUT:
                    raise
                continue
            answered = time.monotonic()
            for job in list(submitted):
                state = status(job.run_dir, queue)
                if state.job is None:
                    submitted.remove(job)
                    if job.collect_result():
                        print(f"finished {job.title}, {len(waiting) + len(submitted)} left")
                    else:
                        failed.append(f"{job.title} (job {job.run_dir.slurm_job()}, {job.run_dir.log_file})")
                        _print_failure(job, failed[-1])
                elif printed.get(job.title) != state.state:
                    printed[job.title] = state.state
                    print(f"{state.state} {job.title}, job {state.job}")
        return failed

    def _submit(self, job: Any, queue: dict[str, str]) -> None:
        """Submit a job, unless it is in the queue."""
        from training.launch.slurm_queue import sbatch_resources, submit

        if job.run_dir.slurm_job() in queue:
            print(f"job {job.run_dir.slurm_job()} has {job.title} already")
            return
        options = [*sbatch_resources(job.config.trainer), *self.options]
        job.run_dir.path.mkdir(parents=True, exist_ok=True)
        options.append(f"--output={str(job.run_dir.log_file.absolute()).replace('%', '%%')}")
        number = submit([*options, f"--job-name={job.title}"], [*job.overrides, *self.search_overrides])
        job.run_dir.write_slurm_job(number)
        print(f"job {number}: {job.title}")
