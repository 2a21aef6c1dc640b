"""The paper's figures from runs: `python scripts/make_figures.py scale=micro [experiment=figure5] [seeds=[0,1,2]]`.

Each figure is written as SVG and PNG into `figures/` of `out`, which is runs/results-micro by default.
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
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from common.files import write_atomic
from common.settings import parse
from scripts.paper_runs import FIGURE_NAMES, PaperSettings, collect_runs, draw_figures
from training.launch.cli import command_line, reporting


@hydra.main(version_base="1.3", config_path="../configs/paper", config_name="results")
def main(cfg: DictConfig) -> None:
    """Write the figures, and print which have no runs."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        settings = parse(PaperSettings, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        names = settings.selected(FIGURE_NAMES)
        collection = None if names == ["figure3"] else collect_runs(settings)
        folder = settings.out_folder("figures")
        figures, not_drawn = draw_figures(names, collection, settings.windows)
        for name, figure in figures.items():
            for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                image = io.BytesIO()
                figure.savefig(image, format=suffix, **options)
                write_atomic(folder / f"{name}.{suffix}", image.getvalue())
            plt.close(figure)
        for warning in collection.warnings if collection is not None else ():
            console.print(warning, style="yellow")
        for name in not_drawn:
            console.print(f"{name} is not drawn: none of its runs is finished", style="yellow")
        console.print(f"figures  {folder}")


if __name__ == "__main__":
    sys.exit(command_line(main))
