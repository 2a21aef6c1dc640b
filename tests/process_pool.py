"""train.py and the scripts as processes that find loaded what takes them seconds to load.

`run` keeps a process that has loaded Lightning and the rest once, and forks for each program. The fork has a folder,
arguments, an environment and output of its own, and is the program from its first line to its exit. Tests of what is
loaded, and of programs that are interrupted from outside, use `subprocess`.
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
#: What takes long.
LOADED = ("training.run", "training.launch.plan", "matplotlib.pyplot", "datasets", "scipy.stats")
_loaded: list[subprocess.Popen[str]] = []


def run(
    program: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a program of the checkout to its end, with further variables in its environment.

    With variables that are read while Hugging Face's libraries are loaded, it starts from nothing.

    Raises:
        subprocess.TimeoutExpired: it took longer than so many seconds; it and those it had started are killed.
    """
    if any(name.startswith("HF_") for name in env or ()):
        command, whole = [sys.executable, str(CHECKOUT / program), *arguments], {**os.environ, **(env or {})}
        return subprocess.run(command, cwd=cwd, env=whole, timeout=timeout, capture_output=True, text=True)
    if not _loaded:
        _loaded.append(subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, cwd=CHECKOUT))
        atexit.register(_loaded[0].kill)
    server = _loaded[0]
    assert server.stdin is not None and server.stdout is not None
    asked: dict[str, Any] = {"command": [str(CHECKOUT / program), *arguments], "cwd": str(cwd), "timeout": timeout}
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as err:
        asked |= {"env": {**(env or {})}, "files": [out.name, err.name]}
        print(json.dumps(asked), file=server.stdin, flush=True)
        status = json.loads(server.stdout.readline())
        said = out.read(), err.read()
    if status is None:
        raise subprocess.TimeoutExpired(asked["command"], timeout, *said)
    return subprocess.CompletedProcess(asked["command"], status, *said)


def _serve() -> dict[str, Any] | None:
    """Fork for each program that is asked for; return it in the fork, and `None` when no more are asked for."""
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if not (child := os.fork()):
            return asked
        print(json.dumps(_waited(child, time.monotonic() + asked["timeout"])), flush=True)
    return None


def _waited(child: int, until: float) -> int | None:
    """Return the exit status of a child, negative for a signal; `None` if it had to be killed."""
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(asked: dict[str, Any]) -> None:
    """Be the program that is asked for."""
    os.setsid()
    os.chdir(asked["cwd"])
    for number, file in enumerate([os.devnull, *asked["files"]]):
        opened = os.open(file, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(asked["env"])
    sys.argv = asked["command"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)
    for module in LOADED:
        importlib.import_module(module)
    gc.freeze()  # memory that is shared with forks stays so
    if (wanted := _serve()) is not None:
        _become(wanted)
