"""The SLURM job that this process belongs to: its ranks for torch, and requeueing it."""

import os
import signal
import subprocess
import sys

#: Signals by which SLURM, or the user, announces the end of a job's time.
TIME_LIMIT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)

#: Environment variable that holds the process id of the launcher on the same machine.
LAUNCHER = "ZCLIP_LAUNCHER"

#: Range of MASTER_PORT, below the ports that systems give to clients.
_PORTS = range(15000, 25000)


def started_by_srun() -> bool:
    """Whether this process is a task of a job step."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def restart_count() -> int:
    """Return how often the job of this process was requeued; 0 outside SLURM."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def has_local_launcher() -> bool:
    """Whether a launcher on this machine started this process; it deals with the job itself."""
    return LAUNCHER in os.environ


def export_torchrun_env() -> None:
    """Set the environment variables that torchrun would set, if srun started this process as one of several."""
    env = os.environ
    if "RANK" in env or not started_by_srun() or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    job = int(env["SLURM_JOB_ID"]) + restart_count()
    tasks_per_node = env["SLURM_STEP_TASKS_PER_NODE"]  # such as 8(x2)
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks_per_node.split("(")[0],
        GROUP_RANK=env["SLURM_NODEID"],
        MASTER_ADDR=SLURMEnvironment.resolve_root_node_address(env["SLURM_STEP_NODELIST"]),
        MASTER_PORT=str(_PORTS[job % len(_PORTS)]),
    )


def job_to_requeue(signum: int) -> str | None:
    """Return the number of the job to requeue: this process's, if the signal announces the end of its time."""
    env = os.environ
    if signum not in TIME_LIMIT_SIGNALS or not started_by_srun() or has_local_launcher():
        return None
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def requeue(job: str) -> None:
    """Requeue a job; if that is not possible, print why on stderr.

    SLURM ends the job's processes at once: what they print afterwards may be lost.
    """
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else None
    except OSError as error:  # a container may not have it
        reason = f"scontrol cannot be run ({error.strerror})"
    if reason is not None:
        print(f"job {job} cannot be requeued: {reason}; run the same command to resume", file=sys.stderr)
