"""Words from run folders, which may come from somebody else, as plain text in Markdown, LaTeX, HTML and images."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from common.text import markdown_table

#: Characters that mean something in Markdown anywhere in a line: emphasis, code, links, HTML, tables, formulas.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
#: What begins a heading, list, quote or rule at the beginning of a line.
_MARKDOWN_START = re.compile(r"^(\d*)([#+=-]|[.)])(?=[#+= -]|$)")

_LATEX: dict[str, str | int | None] = {character: f"\\{character}" for character in "{}$&#_%"}
_LATEX |= {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "±": "$\\pm$"}
_LATEX |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
_LATEX |= {"[": "{[}", "]": "{]}"}  # after a line break a bracket begins its length


def visible(text: str) -> str:
    """Return a text whose controls, surrogates and marks of direction are escapes; line breaks and tabs stay."""
    if text.isprintable():
        return text
    hidden = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t" and unicodedata.category(character) in hidden
        else character
        for character in text
    )


def one_visible_line(text: str) -> str:
    """Return a text in one line, see `visible`."""
    return visible(" ".join(text.split()))


def escape_markdown(text: str) -> str:
    """Return a text as one line of Markdown, as the cell of a table too."""
    escaped = _MARKDOWN.sub(lambda match: f"\\{match[0]}", one_visible_line(text))
    return _MARKDOWN_START.sub(r"\1\\\2", escaped)


def escaped_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table of plain texts in Markdown, see `common.text.markdown_table`."""
    return markdown_table([*map(escape_markdown, header)], ([*map(escape_markdown, row)] for row in rows), left)


def escaped_list(texts: Iterable[str]) -> str:
    """Return a list of plain texts in Markdown, without a line break at its end."""
    return "\n".join(f"- {escape_markdown(text)}" for text in texts)


def escape_latex(text: str) -> str:
    """Return a text as one line of LaTeX."""
    return one_visible_line(text).translate(str.maketrans(_LATEX))
