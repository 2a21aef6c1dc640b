"""The paper's figures from runs: `python scripts/make_figures.py scale=micro [experiment=figure5] [seeds=[0,1,2]]`.

Each is drawn as SVG and PNG into `figures/` below `out`, runs/results-micro if it is not given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import io

import hydra
import matplotlib.pyplot as plt
from omegaconf import DictConfig
from rich.console import Console

from common.files import write_atomic
from scripts.paper_runs import PICTURES, chosen, drawn, gather, out_folder, step_windows
from training.launch.cli import command_line, reporting


@hydra.main(version_base="1.3", config_path="../configs/paper", config_name="results")
def main(cfg: DictConfig) -> None:
    """Draw the figures, and say which have no runs."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        wanted = chosen(cfg, PICTURES)
        windows = step_windows(cfg)
        found = None if wanted == ["figure3"] else gather(cfg)
        folder = out_folder(cfg, "figures")
        figures, undrawn = drawn(wanted, found, windows)
        for name, figure in figures.items():
            for ending, settings in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                picture = io.BytesIO()
                figure.savefig(picture, format=ending, **settings)
                write_atomic(folder / f"{name}.{ending}", picture.getvalue())
            plt.close(figure)
        for said in found.others if found is not None else ():
            console.print(said, style="yellow")
        for name in undrawn:
            console.print(f"{name} is not drawn: none of its runs is done", style="yellow")
        console.print(f"figures  {folder}")


if __name__ == "__main__":
    sys.exit(command_line(main))
