"""The paper's figures from runs: `python scripts/make_figures.py scale=micro [experiment=figure5] [seeds=[0,1,2]]`.

Each figure is written as SVG and PNG into `figures/` of `out`, which is runs/results-micro by default.

    python scripts/make_figures.py scale=micro experiment=figure5
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import matplotlib.pyplot as plt

from common.console import make_console
from common.files import write_atomic
from common.settings import parse
from experiments.paper.images import small_svg
from experiments.run.style import image
from scripts.paper_runs import FIGURE_NAMES, PaperSettings, collect_runs, draw_figures


def main(values: _entry.Values) -> None:
    """Write the figures, and print which have no runs."""
    console = make_console()
    settings = parse(PaperSettings, values)
    names = settings.selected(FIGURE_NAMES)
    collection = None if names == ["figure3"] else collect_runs(settings, names)
    folder = settings.out_folder("figures")
    figures, not_drawn = draw_figures(names, collection, settings.windows)
    for name, figure in figures.items():
        write_atomic(folder / f"{name}.png", image(figure, "png", dpi=150))
        write_atomic(folder / f"{name}.svg", small_svg(figure))
        plt.close(figure)
    for warning in collection.warnings if collection is not None else ():
        console.print(warning, style="yellow")
    for name in not_drawn:
        console.print(f"{name} is not drawn: none of its runs is finished", style="yellow")
    console.print(f"figures  {folder}")


if __name__ == "__main__":
    _entry.run(main, "paper/results")
