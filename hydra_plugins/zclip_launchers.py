"""Hydra launchers of a sweep: several runs at a time on this machine, or each run as a SLURM job.

Every run is `train.py` with its overrides, in a process or job of its own. Finished runs are not repeated, and jobs in
SLURM's queue are not submitted again. Their arguments are explained in configs/hydra/launcher/.
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

from common.errors import ConfigError, RunError, UserError
from common.files import open_append, refuse_link
from training.launch.processes import child_environment
from training.launch.slurm_queue import queued_jobs, sbatch_resources, submit
from training.launch.sweep import Job, compose_job, config_search_overrides, print_plans, status
from training.runtime.signals import Interrupted, override_handler

#: Seconds for which squeue may fail while a sweep waits: SLURM's controller may be restarting.
SQUEUE_TIMEOUT = 600


class _SweepLauncher(Launcher):
    """Base of both launchers; `failed` describes the runs that have not finished."""

    #: Options of sbatch, besides those for nodes, tasks and GPUs.
    options: Sequence[str] = ()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.config = config
        self.search_overrides = config_search_overrides(config.hydra)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.failed: list[str] = []
        jobs = [compose_job(self.loader, self.config, overrides) for overrides in job_overrides]
        if jobs[0].config.plan or jobs[0].config.print_run_dir:
            if jobs[0].config.plan:
                print_plans(jobs, self.search_overrides, self.options)
            else:
                print("\n".join(str(job.run_dir.path) for job in jobs))
            return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=None) for job in jobs]
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # sweepers may write there
        unfinished = [job for job in jobs if not job.collect_result()]
        if len(jobs) > len(unfinished):
            print(f"{len(jobs) - len(unfinished)} of {len(jobs)} are finished already")
        for job in unfinished:
            refuse_link(job.run_dir.log_file)  # before the first one starts
        self.run(list({job.run_dir.path: job for job in unfinished}.values()))  # equal jobs are one run
        if self.failed:
            raise RunError(f"{len(self.failed)} of {len(jobs)} runs have not finished: {', '.join(self.failed)}")
        losses = [(job.run_dir.read_result() or {}).get("test_loss") for job in jobs]  # `None`: submitted only
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=loss)
            for job, loss in zip(jobs, losses, strict=True)
        ]

    def run(self, waiting: list[Job]) -> None:
        """Run the jobs, which it removes from the list."""
        raise NotImplementedError

    def ended(self, job: Job, left: int, how: str) -> None:
        """Collect the result of a job, or describe why there is none; print which."""
        if job.collect_result():
            print(f"finished {job.title}, {left} left")
            return
        self.failed.append(f"{job.title} ({how}, {job.run_dir.log_file})")
        reason = job.run_dir.failure_reason()
        print(f"failed {self.failed[-1]}" + ("" if reason is None else f": {reason}"))


def _check_n_jobs(n_jobs: Any) -> None:
    if type(n_jobs) is not int or n_jobs < 1:
        raise ConfigError("hydra.launcher.n_jobs", n_jobs, "an integer from 1")


class Local(_SweepLauncher):
    """Runs on this machine, each with its output in log.txt of its run folder. Signals are forwarded to them."""

    def __init__(self, n_jobs: int) -> None:
        _check_n_jobs(n_jobs)
        self.n_jobs = n_jobs

    def run(self, waiting: list[Job]) -> None:
        """Run the jobs, `n_jobs` at a time."""
        running: list[tuple[Job, subprocess.Popen[bytes]]] = []
        received: list[int] = []

        def forward(signum: int) -> None:
            received.append(signum)
            for _, process in running:
                process.send_signal(signum)

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
                    code = process.returncode
                    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
                    if not received or job.run_dir.result_file.exists():
                        self.ended(job, len(waiting) + len(running), how)
        if received:
            raise Interrupted(received[0])

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        job.run_dir.path.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", sys.argv[0], *job.overrides, *self.search_overrides]
        env = child_environment(self.n_jobs)
        with open_append(job.run_dir.log_file) as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


class Slurm(_SweepLauncher):
    """Each run as a job of scripts/slurm/train.sbatch, on `trainer.nodes` nodes with `trainer.devices` tasks each."""

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

    def run(self, waiting: list[Job]) -> None:
        """Submit the jobs that are not in the queue, and wait for all."""
        queue = queued_jobs()
        waiting.sort(key=lambda job: job.run_dir.slurm_job() not in queue)
        submitted: list[Job] = []
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
                    self.ended(job, len(waiting) + len(submitted), f"job {job.run_dir.slurm_job()}")
                elif printed.get(job.title) != state.state:
                    printed[job.title] = state.state
                    print(f"{state.state} {job.title}, job {state.job}")

    def _submit(self, job: Job, queue: dict[str, str]) -> None:
        """Submit a job, unless it is in the queue."""
        if job.run_dir.slurm_job() in queue:
            print(f"job {job.run_dir.slurm_job()} has {job.title} already")
            return
        job.run_dir.path.mkdir(parents=True, exist_ok=True)
        output = f"--output={str(job.run_dir.log_file.absolute()).replace('%', '%%')}"
        options = [*sbatch_resources(job.config.trainer), *self.options, output, f"--job-name={job.title}"]
        number = submit(options, [*job.overrides, *self.search_overrides])
        job.run_dir.write_slurm_job(number)
        print(f"job {number}: {job.title}")
