"""Command-line options of programs without a configuration, such as benchmarks."""

import argparse
from typing import NoReturn

from common.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and whose help has the description as it is written.

    Args:
        description: first part of the help, such as a module's docstring.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, where argparse would print the usage as well."""
        raise UserError(message)


def count(text: str) -> int:
    """Return the integer from 1 that an option has as its value, for `type=` of `add_argument`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be an integer from 1")
    return number
