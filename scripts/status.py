"""How the runs of an experiment are doing: `python scripts/status.py [folder=runs/main]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import UserError
from training.launch.cli import command_line, reporting
from training.launch.sweep import status
from training.run_dir import RunDir
from training.runtime.slurm import jobs

STYLES = {
    "done": "green",
    "running": "cyan",
    "waiting": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "damaged": "red",
}


@hydra.main(version_base="1.3", config_path="../configs", config_name="status")
def main(cfg: DictConfig) -> None:
    """Print the table."""
    with reporting():
        folder = Path(cfg.folder)
        if not folder.is_dir():
            raise UserError(f"folder={folder} is not there: it must be the folder of an experiment, as runs/main")
        runs = [RunDir(path) for path in sorted(folder.iterdir())]
        runs = [run for run in runs if run.config_file.is_file() or run.job_file.is_file()]
        queue = jobs() if any(run.job_file.is_file() for run in runs) else {}
        table = Table(title=str(folder), title_justify="left")
        for column in ("run", "state", "step", "loss", "tokens/s", "job"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
        counts = dict.fromkeys(STYLES, 0)
        for run in runs:
            found = status(run, queue)
            counts[found.state] += 1
            step, loss, speed = (found.row.get(name) for name in ("step", "loss", "tokens_per_second"))
            table.add_row(
                escape(run.path.name),
                f"[{STYLES[found.state]}]{found.state}",
                f"{step or 0:,} of {'?' if found.steps is None else format(found.steps, ',')}",
                "-" if loss is None else f"{loss:.3f}",
                "-" if speed is None else f"{speed:,.0f}",
                found.job or "",
            )
        console = Console()
        if not console.is_terminal:  # names stay whole where they are looked for
            console.width = max(console.width, 160)
        console.print(table)
        console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no runs")


if __name__ == "__main__":
    sys.exit(command_line(main))
