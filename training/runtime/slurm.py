"""Under SLURM: which process of a run this is, and sending the job back into the queue."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError

#: Signals by which SLURM, or who submitted a job, says that its time is nearly over.
TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)

#: Environment variable with the process that has started this one on the same machine.
LAUNCHER = "ZCLIP_LAUNCHER"

CHECKOUT = Path(__file__).parents[2]

#: MASTER_PORT is in this range, below those that systems give to clients.
_PORTS = range(15000, 25000)


def started_by_srun() -> bool:
    """Whether this process is a task of a job step."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def restart_count() -> int:
    """Return how often the job of this process has gone back into the queue; 0 if it is none."""
    given = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(given) if given.isdigit() else 0


def has_local_launcher() -> bool:
    """Whether a process of the job has started this one, and sees to the job itself."""
    return LAUNCHER in os.environ


def adopt() -> None:
    """Put into the environment what torch asks for, if srun has started this process as one of several."""
    given = os.environ
    if "RANK" in given or not started_by_srun() or int(given.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    job = int(given["SLURM_JOB_ID"]) + restart_count()
    tasks = given["SLURM_STEP_TASKS_PER_NODE"]  # as 8(x2)
    given.update(
        RANK=given["SLURM_PROCID"],
        WORLD_SIZE=given["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=given["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks.split("(")[0],
        GROUP_RANK=given["SLURM_NODEID"],
        MASTER_ADDR=SLURMEnvironment.resolve_root_node_address(given["SLURM_STEP_NODELIST"]),
        MASTER_PORT=str(_PORTS[job % len(_PORTS)]),
    )


def jobs() -> dict[str, str]:
    """Return the states of the user's jobs in the queue by their numbers; none where there is no SLURM."""
    if shutil.which("squeue") is None:
        return {}
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%i %T"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"squeue does not tell what is in the queue: {reason}")
    return dict(line.split() for line in done.stdout.splitlines())


def sbatch_resources(trainer: Any) -> list[str]:
    """Return the options of sbatch that give a run its nodes, tasks and GPUs."""
    options = [f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}"]
    return options + ([f"--gpus-per-node={trainer.devices}"] if trainer.accelerator == "gpu" else [])


def submit(options: list[str], overrides: list[str]) -> str:
    """Submit a job of scripts/slurm/train.sbatch in this folder, and return its number.

    Raises:
        UserError: sbatch refuses it.
    """
    command = ["sbatch", "--parsable", *options, str(CHECKOUT / "scripts" / "slurm" / "train.sbatch"), *overrides]
    env = {**os.environ, "PYTHON": sys.executable, "TRAIN": str(CHECKOUT / "train.py")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError as error:
        raise UserError("hydra/launcher=slurm is not possible: there is no sbatch here") from error
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def requeue(signum: int) -> bool:
    """Send the job of this process back into the queue, if the signal says that its time is up.

    Returns:
        Whether it is there. If it should be and cannot, stderr says why.
    """
    if signum not in TIME_IS_UP or not started_by_srun() or has_local_launcher():
        return False
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"job {job} cannot be queued again: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode == 0
