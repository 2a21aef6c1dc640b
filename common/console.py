"""The console of every program: what is printed is text, whatever is in it, never markup or commands to a terminal."""

import re
from typing import Any

from rich.console import Console
from rich.text import Text

#: Controls but for line breaks and tabs, surrogates, and what changes the direction of text.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


#: Columns of the narrowest terminal that tables are laid out for: rich fails where no column of theirs has room.
LEAST_WIDTH = 20


def make_console(soft_wrap: bool = True, **options: Any) -> Console:
    """Return a console that prints texts as they are. Options are those of `rich.console.Console`."""
    console = _PlainConsole(soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False, **options)
    if console.width < LEAST_WIDTH:
        console.width = LEAST_WIDTH
    return console


def printable(text: str) -> str:
    """Return a text in which characters that a terminal would obey or cannot show are escapes, such as \\x1b."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_line(text: object) -> str:
    """Return a text, or the message of an error, as one line of `printable` characters."""
    return printable(str(text).strip()).replace("\n", "\\n")


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
