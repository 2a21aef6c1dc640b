"""Errors whose message is one sentence for the user, and the exit statuses that go with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Exit statuses: the user asked for something that is not possible; a run cannot continue. A program fault is 1.
EXIT_USER_ERROR, EXIT_CANNOT_CONTINUE = 2, 3


class UserError(ValueError):
    """The user asked for something that is not possible; the message is one sentence."""


class ConfigError(UserError):
    """A setting, by its dotted key, has a value that is not allowed; the message is one sentence that names both.

    `problem` replaces "is not allowed: it must be `allowed`"; it says what is wrong and what to do.
    """

    def __init__(self, field: str, value: Any, allowed: str = "", problem: str = "") -> None:
        self.field = field
        self.value = value
        self.problem = problem or f"is not allowed: it must be {allowed}"
        super().__init__(f"{field}={shown(value)} {self.problem}")


class RunError(RuntimeError):
    """A run cannot continue, though no code is at fault; the message is one sentence."""


@contextmanager
def prefix_errors(section: str) -> Iterator[None]:
    """Put a section's name in front of the key that an error of the block names.

    Errors with `field`, `value` and `problem`, as `ConfigError` and `zclip.arguments.ArgumentError` have, become a
    `ConfigError`; any other `ValueError` becomes a `UserError`.
    """
    try:
        yield
    except ValueError as error:
        if hasattr(error, "field"):
            raise ConfigError(f"{section}.{error.field}", error.value, problem=error.problem) from error  # type: ignore[attr-defined]
        raise UserError(f"{section}: {error}") from error


def shown(value: Any) -> Any:
    """Return a value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else value


def one_line(error: BaseException, most: int | None = 300) -> str:
    """Return an error's message as one line of at most so many characters; `None`: all."""
    return " ".join(str(error).split())[:most]
