"""What a person sees while a run trains: a bar on a terminal, a line now and then in a log file."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from common.text import SECONDS_BETWEEN_LINES
from training.monitor.metrics import Row
from training.monitor.step_timer import PARTS

SHORT = dict(zip(PARTS, ("data", "fwd+bwd", "clip", "optim"), strict=True))

#: Columns from which a bar also tells what time and memory go to.
WIDE = 160


class ProgressDisplay:
    """Show rows of metrics as they arrive.

    Args:
        steps: of the whole run.
        done: steps already done when this process started.
        console: where to draw.
    """

    def __init__(self, steps: int, done: int, console: Console) -> None:
        self.steps = steps
        self.done = done
        self.console = console
        self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=6 if console.width < 100 else None),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("left"),
                console=console,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, numbers="starting")
            self._bar.start()

    def __call__(self, row: Row) -> None:
        """Show one row."""
        step = row["step"]
        assert isinstance(step, int)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_numbers(row, self.console.width >= WIDE))
            return
        now = time.monotonic()
        if self._first is None:  # the first steps are slower than those to come
            self._first = (now, step)
        if now - self._printed >= SECONDS_BETWEEN_LINES or step == self.steps:
            self._printed = now
            since, at = self._first
            seconds = round((now - since) / (step - at) * (self.steps - step)) if step > at else None
            left = "-:--" if seconds is None else f"{seconds // 60}:{seconds % 60:02}"
            self.console.print(f"step {step}/{self.steps}  {_numbers(row, wide=True)}  {left} left")

    def close(self) -> None:
        """Leave the terminal as it should be."""
        if self._bar is not None:
            self._bar.stop()


def _numbers(row: Row, wide: bool) -> str:
    def show(name: str, spec: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, spec)

    z = f" z {show('z', '+.1f'):>4}" if "z" in row else ""
    clipped = "clipped" if row.get("clipped") else ""
    mfu = f" {show('mfu', '.1%')} MFU" if row.get("mfu") is not None else ""
    return (
        f"loss {show('loss', '.3f')} norm {show('grad_norm', '.3f'):>5}{z} {clipped:7}"
        f" {show('tokens_per_second', ',.0f')} tok/s{mfu}"
        + (f" {show('peak_memory_gib', '.1f')} GiB {_split(row)}" if wide else "")
    )


def _split(row: Row) -> str:
    """Say what a step's time went to."""
    spent = {part: row.get(f"{part}_seconds") for part in PARTS}
    total = sum(value for value in spent.values() if value)
    return " ".join(
        f"{SHORT[part]} {value / total:.0%}" for part, value in spent.items() if value is not None and total
    )
