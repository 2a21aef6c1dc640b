"""Small things done to text, nested settings and lines of progress."""

import difflib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their keys, joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one is most like; `None` if there is none."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)


def overrides_dict(overrides: Iterable[str]) -> dict[str, str]:
    """Return command-line overrides (`key=value`, `+key=value`, `~key`) by their keys."""
    return {key: value for key, _, value in (override.lstrip("+~").partition("=") for override in overrides)}


def quoted(value: str) -> str:
    """Return a text as Hydra's command line takes it, whatever is in it."""
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value)  # other backslashes are no escapes in Hydra
    return "'" + doubled.replace("'", "\\'") + "'"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table in Markdown, without a line break at its end.

    Args:
        header: cells in Markdown, in which `|` is escaped.
        rows: the same of each row.
        left: number of columns, from the first, that are aligned to the left; the others are aligned to the right.
    """
    alignment = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows))


def every(seconds: float = 10.0) -> Callable[[], bool]:
    """Return a function that is true at most once in so many seconds, and not before they have passed once.

    The default is the time between two lines of progress where the output is not a terminal.
    """
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if time.monotonic() - last <= seconds:
            return False
        last = time.monotonic()
        return True

    return is_due
