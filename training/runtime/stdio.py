"""Standard output and error whose failures do not end a run.

Output is dropped on a full disk, into a closed pipe, and where a stream is closed from the start, as by `>&-`.
"""

import os
import sys
from typing import Any, TextIO


class BestEffortStream:
    """A text stream that drops output which cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it if that fails."""
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        try:
            self.stream.flush()
        except BrokenPipeError:  # permanent: Python would flush again at exit, and fail
            _redirect_to_devnull(self.stream)
        except OSError:
            pass


def _redirect_to_devnull(stream: TextIO) -> None:
    """Discard what is still buffered in a stream, and what is written to it later."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def install_best_effort_stdio() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose errors are ignored."""
    _open_closed_descriptors()
    if not isinstance(sys.stdout, BestEffortStream):
        sys.stdout, sys.stderr = (
            BestEffortStream(stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
            for stream in (sys.stdout, sys.stderr)
        )


def _open_closed_descriptors() -> None:
    """Open those of 0, 1 and 2 that are closed: a file would get the number next, and what libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def flush_stdio() -> None:
    """Flush both streams. What cannot be written is dropped: an error at exit would change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            getattr(stream, "stream", stream).flush()
        except OSError:
            _redirect_to_devnull(stream)
