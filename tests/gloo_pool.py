"""Run functions in several gloo processes, which start with their slow imports done.

`run` keeps one server process, a fork of that of process_pool.py, which imports the module of each function once and
forks for each rank. A rank has the environment that torchrun gives it and no process group: the function, or the
library it tests, initializes one. A function that fails or hangs therefore leaves nothing behind for the next one.
"""

import atexit
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.process_pool import CHECKOUT, Job, rank_environments

_servers: list["_Server"] = []


class RankError(AssertionError):
    """A rank raised, was killed by a signal, or took too long; the message has its output."""


class _Server(NamedTuple):
    job: Job
    connection: Connection


class _Request(NamedTuple):
    module: str
    name: str
    world: int
    arguments: tuple[Any, ...]
    port: int
    folder: Path
    timeout: float


def run(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, world, *arguments)` in `world` processes, and return the results by rank.

    Args:
        function: a function of a module, found there by its name.
        world: number of processes.
        arguments: what pickle can copy.
        timeout: seconds until the processes are killed.

    Raises:
        RankError: a process failed, or they took too long.
    """
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} has no name in its module: define it there with def")
    if not _servers:
        _servers.append(_start())
    connection = _servers[0].connection
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    with TemporaryDirectory() as name:
        folder = Path(name)
        request = _Request(function.__module__, function.__qualname__, world, arguments, store.port, folder, timeout)
        try:
            connection.send(request)
            failure: str | None = connection.recv()
        except EOFError:
            output = "".join(_servers[0].job.output())
            _stop()
            raise RankError(f"the server of tests/gloo_pool.py has ended: {output}") from None
        except BaseException:  # such as Ctrl-C: the answer of this call must not be taken for that of the next
            _stop()
            raise
        if failure is not None:
            raise RankError(f"{function.__qualname__} failed in {world} processes: {failure}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _start() -> _Server:
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        listener.settimeout(100)
        job = Job("tests/gloo_pool.py", [f"{folder}/socket"], CHECKOUT, {"PYTHONPATH": str(CHECKOUT)})
        connection = Connection(listener.accept()[0].detach())
    atexit.register(_stop)
    return _Server(job, connection)


def _stop() -> None:
    """Kill the server and its ranks, if there is one."""
    while _servers:
        server = _servers.pop()
        server.connection.close()
        if server.job.poll() is None:
            os.killpg(server.job.pid, signal.SIGKILL)
            server.job.wait()


def _serve(connection: Connection) -> None:
    """Answer requests until the test process closes the connection or ends."""
    while True:
        try:
            request: _Request = connection.recv()
        except EOFError:
            return
        try:
            importlib.import_module(request.module)
        except BaseException:
            connection.send(traceback.format_exc())
            continue
        gc.freeze()  # memory stays shared with forks
        ranks = {}
        for rank in range(request.world):
            if not (pid := os.fork()):
                connection.close()
                _become(rank, request)
            ranks[pid] = rank
        connection.send(_wait(ranks, request, connection))


def _wait(ranks: dict[int, int], request: _Request, connection: Connection) -> str | None:
    """Wait until all ranks have ended. Return which failed, with the output of all; `None` if none did."""
    deadline = time.monotonic() + request.timeout
    failures: list[str] = []

    def note_end(pid: int, status: int) -> None:
        rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            failures.append(f"rank {rank} " + (f"was killed by signal {-code}" if code < 0 else "raised an error"))

    while ranks and not failures:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            note_end(pid, status)
        elif time.monotonic() > deadline:
            failures.append(f"ranks {sorted(ranks.values())} took more than {request.timeout:g} seconds")
        elif connection.poll(0.005):  # the test process has closed the connection
            os.killpg(0, signal.SIGKILL)
    for pid in [*ranks]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:  # it may have ended before the one that was noted first
            note_end(pid, status)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if not failures:
        return None
    files = sorted(request.folder.glob("*.txt"))
    outputs = (f"--- rank {file.stem}\n{file.read_text(errors='replace')}" for file in files)
    return "\n".join([", ".join(failures), *outputs])


def _become(rank: int, request: _Request) -> None:
    """Call the function as this rank and end the process."""
    status = 1
    try:
        with (request.folder / f"{rank}.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= rank_environments(request.world, request.port)[rank]
        # A forked process makes torch's thread pool anew. Threads of autograd that do so at the same time abort.
        torch.set_num_threads(1)
        function = attrgetter(request.name)(sys.modules[request.module])
        torch.save(function(rank, request.world, *request.arguments), request.folder / f"{rank}.pt")
        if dist.is_initialized():
            dist.barrier()  # no rank closes its connections while another uses them
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)
    torch.set_num_threads(1)
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    _serve(Connection(client.detach()))
    os.killpg(0, signal.SIGKILL)
