"""SLURM's queue as the user sees it: which jobs are in it, and submitting a run as a job."""

import os
import shutil
import subprocess
import sys

from common.errors import UserError
from training.config.compose import CONFIGS
from training.config.schema import TrainerConfig


def queued_jobs() -> dict[str, str]:
    """Return the states of the user's jobs by their numbers, if there is SLURM; raise `UserError` if squeue fails."""
    if shutil.which("squeue") is None:
        return {}
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%i %T"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"squeue failed: {reason}")
    return dict(line.split() for line in done.stdout.splitlines() if line.strip())


def sbatch_resources(trainer: TrainerConfig) -> list[str]:
    """Return the options of sbatch for the nodes, tasks and GPUs of a run."""
    options = [f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}"]
    return options + ([f"--gpus-per-node={trainer.devices}"] if trainer.accelerator == "gpu" else [])


def submit(options: list[str], overrides: list[str]) -> str:
    """Submit scripts/slurm/train.sbatch from the current folder; return the number of the job, or raise `UserError`."""
    checkout = CONFIGS.parent
    command = ["sbatch", "--parsable", *options, str(checkout / "scripts" / "slurm" / "train.sbatch"), *overrides]
    env = {**os.environ, "PYTHON": sys.executable, "TRAIN": str(checkout / "train.py")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError as error:
        raise UserError("hydra/launcher=slurm is not possible: sbatch is not installed here") from error
    if done.returncode:
        raise UserError(f"sbatch rejects the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
