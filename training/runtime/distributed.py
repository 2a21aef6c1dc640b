"""One run in several processes: which this is, and starting them.

`python train.py` starts them itself on one machine; under torchrun they are there already. Rank 0 alone writes, and
speaks; but of a failure whoever it happens to.
"""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from common.errors import EXIT_CANNOT_CONTINUE, EXIT_USER_ERROR, RunError, UserError
from training.runtime.signals import SIGNALS, Interrupted, override_handler
from training.runtime.slurm import LAUNCHER

#: Seconds that the others have to end by themselves when one process has ended as it was told to.
GRACE = 60.0

#: Seconds before a process tells of a lost connection, in which the cause can be told, and whoever started it end it.
PATIENCE = 5.0

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class AlreadyReported(UserError):
    """A mistake that a process of the run has reported."""


class ProcessFailed(RunError):
    """A process of the run has failed; the message is empty if it has said why itself."""


class CannotContinue(RunError):
    """A run cannot go on, as one of its processes has said."""


class Stopped(Interrupted):
    """A signal has ended the processes of the run, and they have said so."""


def is_distributed() -> bool:
    """Whether this process is one of several that torchrun, or `launch`, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return this process's number in the run."""
    return int(os.environ["RANK"]) if is_distributed() else 0


def connect(gpu: bool) -> None:
    """Connect the processes of the run, if there are several and they are not; over NCCL too if each has a GPU."""
    if not is_distributed() or dist.is_initialized():
        return
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        atexit.register(dist.destroy_process_group)  # NCCL warns otherwise
    # Python's handlers do not run while torch waits for the others, which may never come.
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """Return what rank 0 finds, in all processes of the run, once they are connected.

    What is on the disk is for rank 0 to say: others may see an older state of it over a network, and need not read all.
    """
    if not is_distributed():
        return decide()
    found = [decide() if rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def die_with_parent() -> None:
    """End this process with the one that launched it, however that ends, if the system can see to it."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before
        os._exit(1)


def child_environment(processes: int) -> dict[str, str]:
    """Return the environment for each of several processes, which share this machine and end with this one."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    return {**threads, **os.environ, LAUNCHER: str(os.getpid())}


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run this program with other arguments in several processes on this machine, until all have ended.

    Signals are passed on to them. When one fails, the others are ended at once.

    Raises:
        AlreadyReported: they have reported a mistake of the user's.
        CannotContinue: they cannot, and have said why.
        ProcessFailed: one has failed, or was killed.
        Stopped: a signal ended them.
        Interrupted: it ended one before that could handle it, and say so.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    shared = {
        **child_environment(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for: the store is there, do not make one
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-u", sys.argv[0], *arguments]
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int) -> None:
        for process in started:
            process.send_signal(signum)

    with override_handler(pass_on):
        try:
            for number in range(processes):
                own = {"RANK": str(number), "LOCAL_RANK": str(number)}
                started.append(subprocess.Popen(command, env=shared | own, start_new_session=True))
            _see_to_the_end(started)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _see_to_the_end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Return when all processes have ended well, or raise when one has not, as `launch` says."""
    while not (ended := [p for p in processes if p.poll()]) and any(p.returncode is None for p in processes):
        time.sleep(0.05)
    if not ended:
        return
    status = ended[0].returncode
    if -status in SIGNALS:  # it came before the process could handle it
        raise Interrupted(-status)
    if status in (EXIT_USER_ERROR, EXIT_CANNOT_CONTINUE):
        _wait(processes[:1], PATIENCE)  # it speaks
        raise AlreadyReported if status == EXIT_USER_ERROR else CannotContinue
    if status - 128 not in SIGNALS:
        said = ""
        if status < 0:
            number, name = processes.index(ended[0]), signal.Signals(-status).name
            said = f"process {number} of the run was ended by {name}: the same command continues"
        raise ProcessFailed(said)
    for process in processes:  # those that were not told what this one was
        process.terminate()
    _wait(processes, GRACE)
    raise Stopped(status - 128)


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait so long at most until processes have ended."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)


def report_failure(error: BaseException) -> None:
    """Write on stderr what happened to this process of several.

    When one fails, the others lose their connections to it: the cause is told first.
    """
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in str(error):
        with override_handler(lambda signum: os._exit(1)):  # the cause is known
            time.sleep(PATIENCE)
    told = "".join(traceback.format_exception(error))
    sys.stderr.write(f"process {rank()} of the run has failed:\n{told}")
    sys.stderr.flush()
