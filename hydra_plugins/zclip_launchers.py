"""Hydra launchers of a sweep: several runs at a time on this machine, or each as a job of SLURM.

Every run is `train.py` with its overrides, in a process or job of its own. What is done is not run again; what runs or
waits already is waited for. Hydra loads this file with every command: what takes time is imported where it is used.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

#: Seconds for which SLURM may not answer while a sweep waits.
PATIENCE = 600


class _Launcher(Launcher):
    """What both have in common."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from training.launch.sweep import config_search_overrides

        self.loader = hydra_context.config_loader
        self.config = config
        self.search_overrides = config_search_overrides(config.hydra)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from common.errors import RunError
        from training.launch.sweep import compose

        jobs = [compose(self.loader, self.config, overrides) for overrides in job_overrides]
        left = [job for job in jobs if not job.finish()]
        if len(jobs) > len(left):
            print(f"{len(jobs) - len(left)} of {len(jobs)} are finished already")
        failed = self.run(left)
        if failed:
            raise RunError(f"{len(failed)} of {len(jobs)} runs have not finished: {', '.join(failed)}")
        return []

    def run(self, jobs: list[Any]) -> list[str]:
        """Do the jobs, and return what to say of those that have not finished."""
        raise NotImplementedError


def _check_n_jobs(n_jobs: Any) -> None:
    from zclip.arguments import is_count

    if not is_count(n_jobs):
        _refuse(f"hydra.launcher.n_jobs={n_jobs} is not allowed: it must be an integer from 1")


def _end(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _tell_failed(job: Any, said: str) -> None:
    print(f"failed {said}" + ("" if (reason := job.folder.reason()) is None else f": {reason}"))


def _refuse(said: str) -> None:
    from common.errors import UserError

    raise UserError(said)


class Local(_Launcher):
    """Runs on this machine, some at a time.

    Args:
        n_jobs: at a time.
    """

    def __init__(self, n_jobs: int) -> None:
        _check_n_jobs(n_jobs)
        self.n_jobs = n_jobs

    def run(self, jobs: list[Any]) -> list[str]:
        """Do them, each with its output in log.txt of its run folder. Signals are passed on to them."""
        from training.runtime.distributed import child_environment
        from training.runtime.signals import Interrupted, override_handler

        running: list[tuple[Any, subprocess.Popen[bytes]]] = []
        failed: list[str] = []
        told: list[int] = []

        def pass_on(signum: int) -> None:
            told.append(signum)
            for _, process in running:
                process.send_signal(signum)

        left = list(jobs)
        with override_handler(pass_on):
            while running or (left and not told):
                if left and not told and len(running) < self.n_jobs:
                    job = left.pop(0)
                    job.folder.path.mkdir(parents=True, exist_ok=True)
                    with job.folder.log.open("ab") as log:
                        process = subprocess.Popen(
                            [sys.executable, "-u", sys.argv[0], *job.overrides, *self.search_overrides],
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=child_environment(self.n_jobs),
                            start_new_session=True,
                        )
                    running.append((job, process))
                    if told:  # meanwhile
                        process.send_signal(told[-1])
                    print(f"started {job.title} ({job.folder.log})")
                time.sleep(0.1)
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    if job.finish():
                        print(f"finished {job.title}, {len(left) + len(running)} left")
                    elif not told:
                        failed.append(f"{job.title} ({_end(process.returncode)}, {job.folder.log})")
                        _tell_failed(job, failed[-1])
        if told:
            raise Interrupted(told[0])
        return failed


class Slurm(_Launcher):
    """Each run as a job of scripts/slurm/train.sbatch, on its `trainer.nodes` with `trainer.devices` tasks each.

    Args:
        time: limit of a job, as sbatch takes it; it goes back into the queue before, and continues.
        signal_seconds: how long before.
        partition, account, qos: of the jobs; `None`: the cluster's default.
        cpus_per_task: of a task; `None`: the cluster's default.
        options: more of sbatch's, as `[--constraint=h100]`.
        n_jobs: in the queue at a time; `None`: all.
        wait: whether to wait for the jobs.
        poll_seconds: how often to look.
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
        if n_jobs is not None:
            _check_n_jobs(n_jobs)
        if n_jobs is not None and not wait:
            _refuse(f"hydra.launcher.n_jobs={n_jobs} is not possible with hydra.launcher.wait=false: it must be null")
        given = {"partition": partition, "account": account, "qos": qos, "cpus-per-task": cpus_per_task, "time": time}
        self.options = [f"--{name}={value}" for name, value in given.items() if value is not None]
        self.options += [f"--signal=USR1@{signal_seconds}", *options]
        self.n_jobs = n_jobs
        self.wait = wait
        self.poll_seconds = poll_seconds

    def run(self, jobs: list[Any]) -> list[str]:
        """Submit those that are not in the queue, wait for all, and return those that have not finished."""
        from common.errors import UserError
        from training.launch.sweep import status
        from training.runtime.slurm import jobs as queue

        there = queue()
        left = sorted(jobs, key=lambda job: job.folder.job() not in there)
        submitted: list[Any] = []
        failed: list[str] = []
        before: dict[str, str] = {}
        answered = time.monotonic()
        while left or submitted:
            while left and (self.n_jobs is None or len(submitted) < self.n_jobs):
                submitted.append(left.pop(0))
                self._submit(submitted[-1], there)
            if not self.wait:
                print("make status tells how they are doing")
                break
            time.sleep(self.poll_seconds)
            try:
                there = queue()
            except UserError:  # the controller may be starting again
                if time.monotonic() - answered > PATIENCE:
                    raise
                continue
            answered = time.monotonic()
            for job in list(submitted):
                state = status(job.folder, there)
                if state.job is None:
                    submitted.remove(job)
                    if job.finish():
                        print(f"finished {job.title}, {len(left) + len(submitted)} left")
                    else:
                        failed.append(f"{job.title} (job {job.folder.job()}, {job.folder.log})")
                        _tell_failed(job, failed[-1])
                elif before.get(job.title) != state.state:
                    before[job.title] = state.state
                    print(f"{state.state} {job.title}, job {state.job}")
        return failed

    def _submit(self, job: Any, queue: dict[str, str]) -> None:
        """Submit a job if it is not in the queue."""
        from training.runtime.slurm import size, submit

        if job.folder.job() in queue:
            print(f"job {job.folder.job()} has {job.title} already")
            return
        options = [*size(job.cfg.trainer), *self.options]
        job.folder.path.mkdir(parents=True, exist_ok=True)
        options.append(f"--output={str(job.folder.log.absolute()).replace('%', '%%')}")
        number = submit([*options, f"--job-name={job.title}"], [*job.overrides, *self.search_overrides])
        job.folder.write_job(number)
        print(f"job {number}: {job.title}")
