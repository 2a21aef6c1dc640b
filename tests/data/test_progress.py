"""Progress is a bar on a terminal, and a line at times in a file."""

import io

from rich.console import Console

import data.progress
from data.progress import progress


def shown(terminal: bool) -> str:
    file = io.StringIO()
    with progress(Console(file=file, force_terminal=terminal, width=100), "beginning") as update:
        update(30, 120, "30 of 120")
        update(60, 120, "60 of 120")
    return file.getvalue()


def test_files_have_a_line_when_one_is_due(monkeypatch):
    due = iter([True, False])
    monkeypatch.setattr(data.progress, "every", lambda: lambda: next(due))
    assert shown(terminal=False) == "30 of 120\n"


def test_terminals_have_a_bar_with_the_completed_share(monkeypatch):
    bars = []

    class Bar(data.progress.Progress):
        def stop(self) -> None:
            bars.extend((task.description, task.completed, task.total) for task in self.tasks)
            super().stop()

    monkeypatch.setattr(data.progress, "Progress", Bar)
    shown(terminal=True)
    assert bars == [("60 of 120", 60, 120)]
