"""Print the state of each run of an experiment: `python scripts/status.py [folder=runs/main]`.

The states are done, running, waiting, failed, stopped and damaged.

    python scripts/status.py folder=runs/main
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from common.console import make_console
from common.errors import UserError
from common.settings import Folder, Settings, parse
from training.launch.slurm_queue import queued_jobs
from training.launch.sweep import status
from training.run_dir import RunDir

#: States in the order of the summary, with their colours.
STYLES = dict(done="green", running="cyan", waiting="yellow", failed="red", stopped="magenta", damaged="red")


class StatusConfig(Settings):
    """Settings of this script."""

    folder: Folder
    """Folder whose subfolders are runs."""


def main(values: _entry.Values) -> None:
    """Print the table."""
    folder = Path(parse(StatusConfig, values).folder)
    if not folder.is_dir():
        raise UserError(f"folder={folder} does not exist: it must be the folder of an experiment, such as runs/main")
    runs = [RunDir(path) for path in sorted(folder.iterdir())]
    runs = [run for run in runs if has_file(run.config_file) or has_file(run.job_file)]
    queue = read_queue() if any(has_file(run.job_file, if_closed=False) for run in runs) else {}
    table = Table(title=str(folder), title_justify="left")
    found = {run: status(run, queue) for run in runs}
    has_scales = any(current.row.get("update_scale") is not None for current in found.values())
    for column in ("run", "state", "step", "loss", *["rate scale"] * has_scales, "tokens/s", "job"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    counts = dict.fromkeys(STYLES, 0)
    for run, current in found.items():
        counts[current.state] += 1
        names = ("step", "loss", "update_scale", "tokens_per_second")
        step, loss, scale, speed = (current.row.get(name) for name in names)
        table.add_row(
            run.path.name,
            Text(current.state, STYLES[current.state]),
            f"{step or 0:,} of {'?' if current.steps is None else format(current.steps, ',')}",
            "-" if loss is None else f"{loss:.3f}",
            *["-" if scale is None else f"{scale:.2f}"] * has_scales,
            "-" if speed is None else f"{speed:,.0f}",
            current.job or "",
        )
    console = make_console()
    if not console.is_terminal:  # names are not wrapped in pipes and files
        console.width = max(console.width, 160)
    console.print(table, soft_wrap=False)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no runs")


def read_queue() -> dict[str, str]:
    """Return the states of the user's jobs by their numbers; none, and say so on stderr, if SLURM does not answer."""
    try:
        return queued_jobs()
    except UserError as error:
        print(f"{error}: the states of jobs in the queue are not known", file=sys.stderr)
        return {}


def has_file(path: Path, if_closed: bool = True) -> bool:
    """Whether a file is there; `if_closed` in somebody else's folder that cannot be looked into."""
    try:
        return path.is_file()
    except PermissionError:
        return if_closed


if __name__ == "__main__":
    _entry.run(main, "status")
