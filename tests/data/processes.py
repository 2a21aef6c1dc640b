"""Processes for tests to kill and to run at once. They start in milliseconds.

They are forks of a server that has imported the package `data` and the library `datasets`.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_fresh_context = multiprocessing.get_context("spawn")
_context.set_forkserver_preload(["data", "datasets", "tests.data.preparation", "tests.data.reader_process"])


class Job:
    """A process that calls a function of a module; what it prints, tracebacks included, is appended to a file.

    A fresh one imports everything itself, because libraries read environment variables when they are imported.
    """

    def __init__(self, output: Path, function: Callable[..., object], *arguments: object, fresh: bool = False) -> None:
        self._output = output
        context = _fresh_context if fresh else _context
        self._process = context.Process(target=_run, args=(output, function, *arguments))
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def status(self) -> int | None:
        """Exit status: negative for a signal, `None` while the process runs."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def kill(self) -> None:
        """Kill the process and its child processes, as `kill -9` does, and wait for its end."""
        assert self._process.pid is not None
        while self._process.is_alive():
            try:
                os.killpg(self._process.pid, 9)
                break
            except ProcessLookupError:  # the process has ended, or is not the leader of its group yet
                time.sleep(0.001)
        self.wait()

    def wait(self) -> str:
        """Return the output when the process has ended."""
        self._process.join(120)
        assert self.status is not None, self.output
        return self.output


def _run(output: Path, function: Callable[..., object], *arguments: object) -> None:
    os.setpgid(0, 0)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
