"""Starting the processes of a run on this machine, and what happens when one of them ends.

`python train.py trainer.devices=N` starts its own processes here. Under torchrun and srun they exist already.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from common.errors import EXIT_CANNOT_CONTINUE, EXIT_USER_ERROR, RunError, UserError
from training.runtime.distributed import rank
from training.runtime.signals import SIGNALS, Interrupted, override_handler
from training.runtime.slurm import LAUNCHER

#: Seconds between a signal to all processes and SIGKILL to those that still run.
SHUTDOWN_GRACE = 60.0
#: Seconds to wait before a lost connection is reported, so that the process that caused it reports first.
ERROR_REPORT_DELAY = 5.0

_PR_SET_PDEATHSIG = 1


class ProcessFailed(RunError):
    """A process of the run failed; the message is empty if that process reported why."""


class Stopped(Interrupted):
    """A signal ended the processes of the run, which have reported it."""


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process when the launcher that started it ends, for whatever reason."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != launcher:
        with suppress(OSError):  # the launcher may have ended, and the pipe to it
            print(
                f"{LAUNCHER}={launcher} is not the process that started this one ({os.getppid()}): that has ended, or "
                "the variable is left over; unset it",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_USER_ERROR)


def child_environment(processes: int) -> dict[str, str]:
    """Return the environment of each of several processes that share this machine and end with this one."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    return {**threads, **os.environ, LAUNCHER: str(os.getpid())}


def local_store() -> Any:
    """Return torch's store in which the processes of a run find each other, for this machine alone.

    torch itself would listen on every interface, and whoever reaches its port may write to it.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run this program in several processes on this machine, and wait until all have ended.

    Signals are forwarded to them. When one fails, the others are killed.

    Raises:
        UserError, RunError: a process reported one; the message is empty.
        ProcessFailed: a process failed, or was killed.
        Stopped: a signal ended the processes.
        Interrupted: a signal killed a process before its handlers were installed.
    """
    store = local_store()
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}
    shared = {
        **loopback,
        **child_environment(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to this store instead of making one
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-u", sys.argv[0], *arguments]
    started: list[subprocess.Popen[bytes]] = []

    def forward(signum: int) -> None:
        for process in started:
            process.send_signal(signum)

    with override_handler(forward):
        try:
            for number in range(processes):
                ranks = {"RANK": str(number), "LOCAL_RANK": str(number)}
                started.append(subprocess.Popen(command, env=shared | ranks, start_new_session=True))
            _supervise(started)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _supervise(processes: list[subprocess.Popen[bytes]]) -> None:
    """Return when all processes have ended with status 0; raise when one has not, as `launch` documents."""
    while not (failed := [p for p in processes if p.poll()]) and any(p.returncode is None for p in processes):
        time.sleep(0.05)
    if not failed:
        return
    status = failed[0].returncode
    if -status in SIGNALS:
        raise Interrupted(-status)
    if status in (EXIT_USER_ERROR, EXIT_CANNOT_CONTINUE):
        _wait(processes[:1], ERROR_REPORT_DELAY)  # rank 0 reports the error
        raise UserError if status == EXIT_USER_ERROR else RunError
    if status - 128 not in SIGNALS:
        message = ""
        if status < 0:
            number, name = processes.index(failed[0]), signal.Signals(-status).name
            message = f"process {number} of the run was killed by {name}; run the same command to resume"
        raise ProcessFailed(message)
    for process in processes:  # the signal may have reached one process only
        process.terminate()
    _wait(processes, SHUTDOWN_GRACE)
    raise Stopped(status - 128)


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until the processes have ended, at most so many seconds."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def report_failure(error: BaseException) -> None:
    """Write the traceback of this rank on stderr, after that of the rank that failed first.

    When one process fails, the others lose their connections to it. They wait `ERROR_REPORT_DELAY` seconds, in which
    the launcher ends them.
    """
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in str(error):
        with override_handler(lambda signum: os._exit(1)):  # the launcher knows the cause
            time.sleep(ERROR_REPORT_DELAY)
    text = "".join(traceback.format_exception(error))
    print(f"process {rank()} of the run has failed:\n{text}", end="", file=sys.stderr, flush=True)
