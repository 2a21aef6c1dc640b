"""Why something could not be written: libraries wrap the system's error in errors of their own."""

from collections.abc import Iterator


def root_cause(error: BaseException) -> BaseException:
    """Return the system's error behind an error, such as a full disk, however it was wrapped; or the error itself.

    torch says `unexpected pos` where a file could not be written, and its distributed format collects the errors of all
    processes in `failures`: the first stands for all.
    """
    chain = list(_chain(error, set()))
    system = (cause for cause in chain if isinstance(cause, OSError) and cause.errno)
    return next(system, next(cause for cause in chain if not _collected(cause)))


def _chain(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """Yield an error and those behind it, the nearest first."""
    if id(error) in seen:
        return
    seen.add(id(error))
    yield error
    context = None if error.__suppress_context__ else error.__context__
    for cause in (*_collected(error), error.__cause__, context):
        if cause is not None:
            yield from _chain(cause, seen)


def _collected(error: BaseException) -> tuple[BaseException, ...]:
    """Return the errors that a group, or torch's `CheckpointException`, collects."""
    if isinstance(error, BaseExceptionGroup):
        return error.exceptions
    failures = getattr(error, "failures", None)
    return tuple(failure for failure, *_ in failures.values()) if isinstance(failures, dict) else ()
