"""Run train.py and the scripts as processes that start with their slow imports done.

One server process has imported Lightning and the rest, and forks for each program. All workers of pytest-xdist share
it: the first to need it starts it, and it ends with the last. The fork has its own folder, arguments, environment and
output, and is the program from its first line to its exit. Tests of what is imported, and of signals during imports,
use `subprocess`.
"""

import atexit
import errno
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any
from uuid import uuid4

CHECKOUT = Path(__file__).parent.parent
#: Modules that take long to import.
PRELOADED = (
    "training.run",
    "training.launch.cli",
    "training.launch.plan",
    "training.launch.sweep",
    "training.config.checks",
    "experiments.run.plot",
    "experiments.run.summary",
    "rich._emoji_codes",
    "threadpoolctl",
    "torch.utils.serialization.config",
    "matplotlib.pyplot",
    "datasets",
    "scipy.stats",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "lm_eval.tasks",
    "lm_eval.evaluator",
)
#: Seconds after which the other ranks are killed when one has failed; the program waits 5 s before it reports.
RANK_GRACE = 8.0
#: The socket of the server, one for each run of pytest.
ADDRESS = Path(gettempdir(), f"zclip-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or uuid4().hex}")
#: The environment of programs: that of the tests, before any of them has changed it.
ENVIRONMENT = dict(os.environ)
_connections: list[Connection] = []


def _request(message: dict[str, Any]) -> Any:
    """Send a request to the server, and return its answer."""
    if not _connections:
        _connections.append(_connect())
    _connections[0].send(message)
    return _connections[0].recv()


def _connect() -> Connection:
    """Connect to the server, which is started unless another process has."""
    server: subprocess.Popen[bytes] | None = None
    while True:
        client = socket.socket(socket.AF_UNIX)
        if not client.connect_ex(str(ADDRESS)):
            return Connection(client.detach())
        client.close()
        if server is None:
            command, null = [sys.executable, __file__, str(ADDRESS)], subprocess.DEVNULL
            server = subprocess.Popen(
                command, cwd=CHECKOUT, env=ENVIRONMENT, stdin=null, stdout=null, start_new_session=True
            )
        elif server.poll():
            raise RuntimeError("the server of tests/process_pool.py has ended, see its output")
        time.sleep(0.01)


class Job:
    """A program that runs, with the methods of `subprocess.Popen`; its output goes to files.

    Args:
        program: path in the checkout.
        arguments: command-line arguments.
        cwd: working directory.
        env: additional environment variables.
    """

    def __init__(self, program: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.args = [str(CHECKOUT / program), *arguments]
        self.returncode: int | None = None
        self._out, self._err = (NamedTemporaryFile("r") for _ in range(2))  # noqa: SIM115 - open as long as the job
        files = [self._out.name, self._err.name]
        self.pid: int = _request({"command": self.args, "cwd": str(cwd), "env": {**(env or {})}, "files": files})

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; `None` while the program runs."""
        if self.returncode is None:
            self.returncode = _request({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Return the exit status once there is one. Kill the program and its children, and raise, after `timeout`."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                self.wait()
                raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
            time.sleep(0.005)
        return status

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Return stdout and stderr once the program has ended; see `wait`."""
        self.wait(timeout)
        return self.output()

    def output(self) -> tuple[str, str]:
        """Return what the program has written on stdout and stderr since the last call."""
        return self._out.read(), self._err.read()

    def lines(self) -> Iterator[str]:
        """Yield the lines of stdout as they are written, until the program ends."""
        text = ""
        while (running := self.poll() is None) or not text.endswith("\n"):
            text += self._out.readline()
            if text.endswith("\n"):
                yield text
                text = ""
            elif running:
                time.sleep(0.005)
            else:
                return

    def send_signal(self, signum: int) -> None:
        """Send a signal to the program, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    program: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a program of the checkout to its end.

    Args:
        program: path in the checkout.
        arguments: command-line arguments.
        cwd: working directory.
        env: additional environment variables. With variables of Hugging Face, whose libraries read them when they are
            imported, the program runs in a new process.
        timeout: seconds.

    Raises:
        subprocess.TimeoutExpired: it took longer; it and its child processes were killed.
    """
    if any(name.startswith("HF_") for name in env or ()):
        command, variables = [sys.executable, str(CHECKOUT / program), *arguments], {**os.environ, **(env or {})}
        return subprocess.run(command, cwd=cwd, env=variables, timeout=timeout, capture_output=True, text=True)
    job = Job(program, arguments, cwd, env)
    output = job.communicate(timeout)
    return subprocess.CompletedProcess(job.args, job.wait(), *output)


def rank_environments(processes: int, port: int) -> list[dict[str, str]]:
    """Return the variables that torchrun gives each rank; rank 0 connects to the store of the port, and makes none."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_ranks(
    program: str, *arguments: str, processes: int, cwd: Path, env: Mapping[str, str] | None = None
) -> tuple[Any, list[Job]]:
    """Start a program of the checkout in several processes, as torchrun does.

    Returns the store that connects them, which must be kept while they run, and the processes by rank.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    environments = rank_environments(processes, store.port)
    return store, [Job(program, arguments, cwd, {**(env or {}), **own}) for own in environments]


def run_ranks(
    program: str,
    *arguments: str,
    processes: int,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a program of the checkout in several connected processes, as torchrun does.

    The result has the output of all ranks, and the status of the first rank that failed.
    """
    store, jobs = start_ranks(program, *arguments, processes=processes, cwd=cwd, env=env)
    deadline = time.monotonic() + timeout
    while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        if any(job.poll() for job in jobs):
            deadline = min(deadline, time.monotonic() + RANK_GRACE)
        time.sleep(0.005)
    status = next((job.returncode for job in jobs if job.returncode), 0)
    timed_out = not status and any(job.returncode is None for job in jobs)
    for job in jobs:
        job.kill()
        job.wait()
    del store
    out, err = map("".join, zip(*(job.output() for job in jobs), strict=True))
    if timed_out:
        raise subprocess.TimeoutExpired(jobs[0].args, timeout, out, err)
    return subprocess.CompletedProcess(jobs[0].args, status, out, err)


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Answer the requests of all clients. Return the request in a fork, and `None` in the server without clients."""
    clients: list[Connection] = []
    while True:
        for ready in wait([listener, *clients]):
            if ready is listener:
                clients.append(Connection(listener.accept()[0].detach()))
                continue
            assert isinstance(ready, Connection)
            try:
                request: dict[str, Any] = ready.recv()
            except (EOFError, ConnectionResetError):
                clients.remove(ready)
                if not clients:
                    ADDRESS.unlink(missing_ok=True)
                    if not wait([listener], 0):
                        return None
                continue
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            elif not (answer := os.fork()):
                listener.close()
                for client in clients:
                    client.close()
                return request
            with suppress(BrokenPipeError):  # the client was killed
                ready.send(answer)


def _fill_caches() -> None:
    """Do what is slow the first time: parse an override, plan a run, find the fonts, and draw text."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from matplotlib import pyplot

    from training.config.compose import load_config
    from training.launch.plan import plan

    overrides = ["a.b=[1,x]", "c=1e-3,'y'", "+d=null", "~e", "f={g:true}", "h=a/b_c.d-e", "i=glob(*)"]
    OverridesParser.create().parse_overrides(overrides)
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        plan(load_config(compose("train", ["lr=1e-3"])))
    figure, axes = pyplot.subplots(layout="constrained")
    axes.set(title="title", yscale="log", ylim=(0.1, 10))
    figure.savefig(BytesIO(), dpi=50)
    pyplot.close(figure)


def _forget_plugins() -> None:
    """Let Hydra look for its plugins again."""
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    Singleton._instances.pop(Plugins, None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hydra_plugins"]:
        del sys.modules[name]


def _become(request: dict[str, Any]) -> None:
    """Run the requested program in this process."""
    os.setsid()
    os.chdir(request["cwd"])
    for number, file in enumerate([os.devnull, *request["files"]]):
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(request["env"])
    sys.argv = request["command"]
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *filter(None, paths)]
    if any(paths):
        _forget_plugins()  # there may be others
    status: Any = None
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    if "RANK" in os.environ or not isinstance(status, int | None):
        sys.exit(status)
    _exit(status or 0)


def _exit(status: int) -> None:
    """End this process as the interpreter does, except that modules stay in memory.

    A fork that takes them down copies the server's memory first, which takes longer than many programs. Ranks do it, as
    a rank may wait there for another.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner may ignore it, as nohup does SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ADDRESS = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(ADDRESS))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # by a server that was started at the same time
                sys.exit()
            raise
        listener.listen()
        sys.path[0] = str(CHECKOUT)
        gc.disable()  # imports make no garbage
        for module in PRELOADED:
            importlib.import_module(module)
        _fill_caches()
        gc.freeze()  # memory stays shared with forks
        gc.enable()
        request = _serve(listener)
    if request is None:
        os._exit(0)
    _become(request)
