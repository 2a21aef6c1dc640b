"""Checks of arguments. Each returns the value, or raises an error that names the argument and what is allowed."""

import sys
from collections.abc import Sequence
from typing import TypeGuard, TypeVar

T = TypeVar("T")


class ArgumentError(ValueError):
    """An argument (`field`) has a `value` that is not allowed; the message is one sentence that names both.

    `problem` is what is wrong and what to do, such as "is not allowed: it must be a number above 0".
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(field, value, problem)
        self.field = field
        self.value = value
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}={self.value} {self.problem}"


def require(condition: bool, field: str, value: T, allowed: str, null: str = "") -> T:
    """Return a value if it meets a condition, or is `None` and `null` says what that means, such as "for no bound"."""
    if not condition and (value is not None or not null):
        words = f"{allowed}, or null {null}" if null else allowed
        raise ArgumentError(field, value, f"is not allowed: it must be {words}")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite int or float; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def positive(field: str, value: T, null: str = "") -> T:
    """Return a number above 0; for `null` see `require`."""
    return require(is_number(value) and value > 0, field, value, "a number above 0", null)


def decay(field: str, value: T) -> T:
    """Return a factor of a moving average."""
    return require(is_number(value) and 0 <= value < 1, field, value, "a number from 0 to below 1")


def integer(field: str, value: T, minimum: int = 1, null: str = "") -> T:
    """Return an int from `minimum` to 2**31 - 1; for `null` see `require`."""
    valid = isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**31
    return require(valid, field, value, f"an integer from {minimum}", null)


def one_of(field: str, value: T, allowed: Sequence[str]) -> T:
    """Return one of several words."""
    return require(value in allowed, field, value, f"one of {', '.join(allowed)}")
