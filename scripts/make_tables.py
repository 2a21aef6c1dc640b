"""The paper's tables with our numbers: `python scripts/make_tables.py scale=micro [experiment=table3] [seeds=[0,1,2]]`.

Each table is written as Markdown, LaTeX and CSV into `tables/` of `out`, which is runs/results-micro by default.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from common.files import write_atomic
from common.settings import parse
from experiments.paper.suites import TABLES
from experiments.paper.tables import as_csv, fill_table, latex, markdown
from scripts.paper_runs import PaperSettings, collect_runs
from training.launch.cli import command_line, reporting


@hydra.main(version_base="1.3", config_path="../configs/paper", config_name="results")
def main(cfg: DictConfig) -> None:
    """Write and print the tables, and print which runs were excluded."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        settings = parse(PaperSettings, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        names = settings.selected(tuple(TABLES))
        collection = collect_runs(settings)
        folder = settings.out_folder("tables")
        for name in names:
            filled = fill_table(TABLES[name], collection)
            for suffix, text in (("md", markdown(filled)), ("tex", latex(filled)), ("csv", as_csv(filled))):
                write_atomic(folder / f"{name}.{suffix}", text)
            console.print(markdown(filled))
        for warning in collection.warnings:
            console.print(warning, style="yellow")
        console.print(f"tables   {folder}")


if __name__ == "__main__":
    sys.exit(command_line(main))
