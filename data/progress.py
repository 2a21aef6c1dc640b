"""Progress in the terminal, and in files and pipes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from common.text import every


@contextmanager
def progress(console: Console, text: str) -> Iterator[Callable[[float, float | None, str], None]]:
    """Yield a function that shows progress: a bar on a terminal, which begins with a text, otherwise a line at times.

    The function takes how much is completed, the total (`None`: unknown), and a text that describes both.
    """
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        line_due = every()

        def update(completed: float, total: float | None, text: str) -> None:
            bar.update(task, completed=completed, total=total, description=text)
            if not console.is_terminal and line_due():
                console.print(text)

        yield update
