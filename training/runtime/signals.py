"""Being told to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2, and SIGHUP, when a terminal closes.

While a run trains, a signal sets a flag and nothing else: see stopping.py. At any other time everything on the disk is
whole already, and a signal ends the program where it is, or as soon as it is loaded. A second Ctrl-C does so at once.
Where it is may be a library that swallows every exception: fsspec, for one, then says that a file is not there. So
what a signal has raised is raised again by `reraise_pending`: before such an error is told, before what takes long is begun, at
the next signal.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

#: Those that whoever starts this process may want ignored, as shells do with Ctrl-C, and nohup with SIGHUP.
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ends the program; those that come from now on do not but for Ctrl-C, unless this one was swallowed.

    Args:
        signum: which.
        step: after which the run continues; `None` if it was not training.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        global _react, _ending
        super().__init__(signum)
        self.signum = signum
        self.step = step
        _react, _ending = _leave, self


def _end(signum: int) -> None:
    raise Interrupted(signum)


def _leave(signum: int) -> None:
    if signum == signal.SIGINT:
        os._exit(128 + signum)
    reraise_pending()


def reraise_pending() -> None:
    """Raise again what ends the program, if it was swallowed: if it is not being handled where this is called."""
    error = sys.exception()
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    if error is None and _ending is not None:
        raise _ending


def end() -> None:
    """Take note that it has arrived: nothing is raised any more while the program ends."""
    global _ending
    _ending = None


def _remember(signum: int) -> None:
    global _early
    _early = _early or signum


_react: Callable[[int], None] = _remember
_ending: Interrupted | None = None
_interrupts = 0
_early = 0


def _received(signum: int, frame: FrameType | None) -> None:
    global _interrupts
    _interrupts += signum == signal.SIGINT
    if _interrupts > 1 and signum == signal.SIGINT and _react is not _end:
        if sys.stderr.isatty():
            with suppress(OSError):
                os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar hides
        os._exit(128 + signum)
    _react(signum)


def install_handlers() -> None:
    """Heed the signals from now on, by remembering them until `begin`; but for those that are to be ignored."""
    for signum in SIGNALS:
        if signum not in MAY_BE_IGNORED or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _received)


def begin() -> None:
    """Let signals end the program from now on; one that has come since `install_handlers` does it at once."""
    global _react
    _react = _end
    if _early:
        _end(_early)


@contextmanager
def override_handler(react: Callable[[int], None]) -> Iterator[None]:
    """Call `react` with a signal's number, in place of ending the program, until the block ends.

    Raises:
        Interrupted: a signal had been to end it before.
    """
    global _react, _interrupts
    reraise_pending()
    before, _react, _interrupts = _react, react, 0
    try:
        yield
    finally:
        if _react is react:
            _react = before


def say(stop: Interrupted, queued: bool) -> None:
    """Tell the user what a signal has ended, and how it goes on: by the same command, or by a job in a queue."""
    which = "the job is in the queue again and" if queued else "the same command"
    if stop.step is None:
        said = f"interrupted: {which} goes on"
    else:
        said = f"interrupted after step {stop.step}: {which} continues after step {stop.step}"
    print(said, file=sys.stderr)
