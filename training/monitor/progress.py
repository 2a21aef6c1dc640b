"""What a user sees while a run trains: a bar on a terminal, a line now and then in a log file."""

import time
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.text import every
from training.monitor.metrics import Row
from training.monitor.step_timer import STEP_PHASES

SHORT_NAMES = dict(zip(STEP_PHASES, ("data", "fwd+bwd", "clip", "optim"), strict=True))

#: Columns from which a bar also shows memory and the shares of the phases.
WIDE = 160


@dataclass
class ProgressDisplay:
    """Shows rows of metrics as they arrive, while it is entered as a context."""

    steps: int  # of the whole run
    first_step: int  # steps that were done before this process started
    console: Console

    def __post_init__(self) -> None:
        self._first_row: tuple[float, int] | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._line_due = every()
        if self.console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=6 if self.console.width < 100 else None),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("left"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=self.steps, completed=self.first_step, numbers="starting")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: int, row: Row) -> None:
        """Show the row of a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_numbers(row, self.console.width >= WIDE))
            return
        now = time.monotonic()
        if self._first_row is None:  # the first steps are slower than the others
            self._first_row = (now, step)
        if self._line_due() or step == self.steps:
            first_time, first_step = self._first_row
            done = step - first_step
            seconds = round((now - first_time) / done * (self.steps - step)) if done > 0 else None
            left = "-:--" if seconds is None else f"{seconds // 60}:{seconds % 60:02}"
            self.console.print(f"step {step}/{self.steps}  {_numbers(row, wide=True)}  {left} left")


def _numbers(row: Row, wide: bool) -> str:
    def text(name: str, spec: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, spec)

    z = f" z {text('z', '+.1f'):>4}" if "z" in row else ""
    clipped = "clipped" if row.get("clipped") else ""
    scale = row.get("update_scale")
    scaled = f" lr x{scale:.2f}" if scale is not None and scale < 1 else ""
    mfu = f" {text('mfu', '.1%')} MFU" if row.get("mfu") is not None else ""
    return (
        f"loss {text('loss', '.3f')} norm {text('grad_norm', '.3f'):>5}{z} {clipped:7}{scaled}"
        f" {text('tokens_per_second', ',.0f')} tok/s{mfu}"
        + (f" {text('peak_memory_gib', '.1f')} GiB {_phase_shares(row)}" if wide else "")
    )


def _phase_shares(row: Row) -> str:
    """Return the share of each phase in the time of a step, as text."""
    times = {phase: row.get(f"{phase}_seconds") for phase in STEP_PHASES}
    total = sum(value for value in times.values() if value)
    return " ".join(
        f"{SHORT_NAMES[phase]} {value / total:.0%}" for phase, value in times.items() if value is not None and total
    )
