"""The paper's tables with our numbers: `python scripts/make_tables.py scale=micro [experiment=table3] [seeds=[0,1,2]]`.

Each table is written as Markdown, LaTeX and CSV into `tables/` of `out`, which is runs/results-micro by default.

    python scripts/make_tables.py scale=micro experiment=table3
"""

import _entry  # first: it finds the checkout and installs the signal handlers

from common.console import make_console
from common.files import write_atomic
from common.settings import parse
from experiments.paper.render import as_csv, fill_table, latex, markdown
from experiments.paper.tables_and_figures import TABLES
from scripts.paper_runs import PaperSettings, collect_runs


def main(values: _entry.Values) -> None:
    """Write and print the tables, and print which runs were excluded."""
    console = make_console()
    settings = parse(PaperSettings, values)
    names = settings.selected(tuple(TABLES))
    collection = collect_runs(settings, names)
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
    _entry.run(main, "paper/results")
