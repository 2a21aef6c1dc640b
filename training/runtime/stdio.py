"""Standard output and error that cannot end a run: on a full disk, or with a reader that has gone, words are lost."""

import os
import sys
from typing import Any, TextIO


class BestEffortStream:
    """A text stream whose writing does not fail.

    Args:
        stream: what it writes to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or do not."""
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Bring out what was written, if that is possible."""
        try:
            self.stream.flush()
        except BrokenPipeError:  # for ever: Python would try again when it ends, and fail
            _give_up(self.stream)
        except OSError:
            pass


def _give_up(stream: TextIO) -> None:
    """Have all that is still to be written to a stream go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def install_best_effort_stdio() -> None:
    """Have all that the program says go through streams whose writing does not fail."""
    if not isinstance(sys.stdout, BestEffortStream):
        sys.stdout, sys.stderr = BestEffortStream(sys.stdout), BestEffortStream(sys.stderr)


def close() -> None:
    """Bring out what is left; what cannot be written is given up, or Python would end with a status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            getattr(stream, "stream", stream).flush()
        except OSError:
            _give_up(stream)
