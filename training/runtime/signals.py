"""Signals that stop a program: SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2, and SIGHUP of a closed terminal.

During training, a handler only records the signal; see coordinated_stop.py. At any other time all files on the disk are
complete, so a signal raises `Interrupted` where the program is, or as soon as its imports are done. A second Ctrl-C
exits at once.

Some libraries swallow the exception that the handler raised: fsspec reports a missing file instead. `reraise_pending`
raises it again. It is called before an error is reported, before long work begins, and at the next signal.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

#: Signals that are handled.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

#: Signals that stay ignored if the parent process ignores them: shells do so with SIGINT, nohup with SIGHUP.
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ends the program. Later signals are ignored, except Ctrl-C, unless this exception was swallowed.

    `step` is the optimizer step after which the run resumes; `None` outside training.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        global _handler, _pending
        super().__init__(signum)
        self.signum = signum
        self.step = step
        _handler, _pending = _while_exiting, self


def _exit(signum: int) -> None:
    """Handler outside training."""
    raise Interrupted(signum)


def _while_exiting(signum: int) -> None:
    """Handler after `Interrupted` was raised."""
    if signum == signal.SIGINT:
        os._exit(128 + signum)
    reraise_pending()


def _while_importing(signum: int) -> None:
    """Handler before `enable_exit`: the first signal is recorded."""
    global _early_signal
    _early_signal = _early_signal or signum


_handler: Callable[[int], None] = _while_importing
_pending: Interrupted | None = None
_interrupts = 0
_early_signal = 0


def reraise_pending() -> None:
    """Raise the pending `Interrupted` again, unless the caller is handling it."""
    error = sys.exception()
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    if error is None and _pending is not None:
        raise _pending


def clear_pending() -> None:
    """Forget the pending `Interrupted`: the program is exiting because of it."""
    global _pending
    _pending = None


def _dispatch(signum: int, frame: FrameType | None) -> None:
    """Handle a signal: exit at once on a second Ctrl-C, else call the current handler."""
    global _interrupts
    _interrupts += signum == signal.SIGINT
    if _interrupts > 1 and signum == signal.SIGINT and _handler is not _exit:
        if sys.stderr.isatty():
            with suppress(OSError):
                os.write(2, b"\x1b[?25h")  # shows the cursor, which a progress bar hides
        os._exit(128 + signum)
    _handler(signum)


def install_handlers() -> None:
    """Handle `SIGNALS`, by recording them until `enable_exit`; those that must stay ignored do."""
    for signum in SIGNALS:
        if signum not in MAY_BE_IGNORED or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _dispatch)


def enable_exit() -> None:
    """Raise `Interrupted` on a signal from here on, and at once if one arrived since `install_handlers`."""
    global _handler
    _handler = _exit
    if _early_signal:
        _exit(_early_signal)


@contextmanager
def override_handler(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each signal until the block ends. A pending `Interrupted` is raised first."""
    global _handler, _interrupts
    reraise_pending()
    previous, _handler, _interrupts = _handler, handler, 0
    try:
        yield
    finally:
        if _handler is handler:
            _handler = previous


def print_interrupted(error: Interrupted, requeued: bool) -> None:
    """Print on stderr where the run stopped and how to resume it; SLURM restarts a job that is requeued."""
    where = "interrupted" if error.step is None else f"interrupted after step {error.step}"
    resume = "the job is requeued and resumes by itself" if requeued else "run the same command to resume"
    print(f"{where}; {resume}", file=sys.stderr)
