"""The paper's tables with our numbers: `python scripts/make_tables.py scale=micro [experiment=table3] [seeds=[0,1,2]]`.

Each is written as Markdown, LaTeX and CSV into `tables/` below `out`, runs/results-micro if it is not given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import hydra
from omegaconf import DictConfig
from rich.console import Console

from common.files import write_atomic
from experiments.paper.suites import TABLES
from experiments.paper.tables import as_csv, fill, latex, markdown
from scripts.paper_runs import chosen, gather, out_folder
from training.launch.cli import command_line, reporting


@hydra.main(version_base="1.3", config_path="../configs/paper", config_name="results")
def main(cfg: DictConfig) -> None:
    """Write the tables, print them, and say which runs were left out."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        wanted = chosen(cfg, tuple(TABLES))
        found = gather(cfg)
        folder = out_folder(cfg, "tables")
        for name in wanted:
            filled = fill(TABLES[name], found)
            for ending, text in (("md", markdown(filled)), ("tex", latex(filled)), ("csv", as_csv(filled))):
                write_atomic(folder / f"{name}.{ending}", text)
            console.print(markdown(filled))
        for said in found.others:
            console.print(said, style="yellow")
        console.print(f"tables   {folder}")


if __name__ == "__main__":
    sys.exit(command_line(main))
