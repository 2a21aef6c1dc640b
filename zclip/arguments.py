"""Checks of arguments, and the error that names an argument, its value and what is allowed."""

import math


class ArgumentError(ValueError):
    """An argument has a value that is not allowed; the message is one sentence that names both.

    Args:
        field: name of the argument.
        value: its value.
        problem: what is wrong and what to do, such as "is not allowed: it must be a number above 0".
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(field, value, problem)
        self.field = field
        self.value = value
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}={self.value} {self.problem}"


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise `ArgumentError` unless a condition holds.

    Args:
        condition: whether the value is allowed.
        field: name of the argument.
        value: its value.
        allowed: what is allowed, such as "a number above 0".

    Raises:
        ArgumentError: `condition` is false.
    """
    if not condition:
        raise ArgumentError(field, value, f"is not allowed: it must be {allowed}")


def is_number(value: object) -> bool:
    """Return whether `value` is a finite int or float; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object, minimum: int = 1) -> bool:
    """Return whether `value` is an int from `minimum` to 2**31 - 1; a bool is not."""
    return type(value) is int and minimum <= value < 2**31
