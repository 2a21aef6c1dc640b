"""Run train.py and the scripts as processes that start with their slow imports done.

`run` keeps one server process that has imported Lightning and the rest, and forks for each program. The fork has its
own folder, arguments, environment and output, and is the program from its first line to its exit. Tests of what is
imported, and of programs that are interrupted from outside, use `subprocess`.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

CHECKOUT = Path(__file__).parent.parent
#: Modules that take long to import.
PRELOADED = ("training.run", "training.launch.plan", "matplotlib.pyplot", "datasets", "scipy.stats")
_servers: list[subprocess.Popen[str]] = []


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
    if not _servers:
        _servers.append(subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, cwd=CHECKOUT))
        atexit.register(_servers[0].kill)
    server = _servers[0]
    assert server.stdin is not None and server.stdout is not None
    request: dict[str, Any] = {"command": [str(CHECKOUT / program), *arguments], "cwd": str(cwd), "timeout": timeout}
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as err:
        request |= {"env": {**(env or {})}, "files": [out.name, err.name]}
        print(json.dumps(request), file=server.stdin, flush=True)
        status = json.loads(server.stdout.readline())
        output = out.read(), err.read()
    if status is None:
        raise subprocess.TimeoutExpired(request["command"], timeout, *output)
    return subprocess.CompletedProcess(request["command"], status, *output)


def _serve() -> dict[str, Any] | None:
    """Fork for each request. Return the request in the fork, and `None` in the server when there are no more."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if not (child := os.fork()):
            return request
        print(json.dumps(_wait(child, time.monotonic() + request["timeout"])), flush=True)
    return None


def _wait(child: int, deadline: float) -> int | None:
    """Return the exit status of a child, negative for a signal; `None` if it was killed at the deadline."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(request: dict[str, Any]) -> None:
    """Run the requested program in this process."""
    os.setsid()
    os.chdir(request["cwd"])
    for number, file in enumerate([os.devnull, *request["files"]]):
        descriptor = os.open(file, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(request["env"])
    sys.argv = request["command"]
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *filter(None, paths)]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # memory stays shared with forks
    if (request := _serve()) is not None:
        _become(request)
