"""Checks of arguments. Each returns the value, or raises an error that names the argument and what is allowed."""

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

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
    """Return a value if it meets a condition, or is `None` and `null` says what that means, such as "for no bound".

    It is returned as `plain` has it. An integer of 2**31 or more is returned as a float: torch takes no integer above
    2**63, and a rule may square it.
    """
    if not condition and (value is not None or not null):
        words = f"{allowed}, or null {null}" if null else allowed
        raise ArgumentError(field, value, f"is not allowed: it must be {words}{_unlike_text(value)}")
    number: Any = plain(value)
    if isinstance(number, int) and abs(number) >= 2**31 and is_number(number):
        number = float(number)
    return number


def plain(value: Any) -> Any:
    """Return a number, truth value or text of any class as an int, float, bool or str, and all else as it is."""
    if isinstance(value, str):
        return str.__str__(value)  # a subclass may have another text, such as the name of an enum's member
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    is_numpy_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    return bool(value) if is_numpy_bool else value


def plain_nested(value: Any) -> Any:
    """Return an argument as file formats restore it: numbers and texts of Python's own types, tuples as lists."""
    if isinstance(value, tuple | list):
        return [plain_nested(inner) for inner in value]
    if type(value) is dict:
        return {plain(key): plain_nested(inner) for key, inner in value.items()}
    return plain(value)


def array_in(value: Any) -> str:
    """Return the kind of an array or tensor that an argument is or has; none, if there is none."""
    if isinstance(value, list | dict):
        return next(filter(None, map(array_in, value.values() if isinstance(value, dict) else value)), "")
    return f"a {type(value).__name__}" if hasattr(type(value), "__array__") else ""


def _unlike_text(value: object) -> str:
    """Return words on the type of a value whose text does not show it, such as that of a tensor; or none."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
    elif value is None or isinstance(value, int | float | list | tuple | dict):
        return ""
    return f", not of type {type(value).__name__}"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a real number that float64 can hold, and finite; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(plain(value)) <= sys.float_info.max


def positive(field: str, value: T, null: str = "") -> T:
    """Return a number above 0; for `null` see `require`."""
    return require(is_number(value) and value > 0, field, value, "a number above 0", null)


def decay(field: str, value: T) -> T:
    """Return a factor of a moving average."""
    return require(is_number(value) and 0 <= value < 1, field, value, "a number from 0 to below 1")


def integer(field: str, value: T, minimum: int = 1, null: str = "") -> T:
    """Return an integer from `minimum` to 2**31 - 1; for `null` see `require`."""
    number = plain(value)
    valid = isinstance(number, int) and not isinstance(number, bool) and minimum <= number < 2**31
    return require(valid, field, value, f"an integer from {minimum}", null)


def boolean(field: str, value: T) -> T:
    """Return a truth value."""
    return require(isinstance(plain(value), bool), field, value, "true or false")


def one_of(field: str, value: T, allowed: Sequence[str]) -> T:
    """Return one of several words."""
    return require(isinstance(value, str) and value in allowed, field, value, f"one of {', '.join(allowed)}")
