"""Read the runs of a lab, and write its tables and figures: `python scripts/make_lab.py lab=adam_lag`.

The runs are those of `python train.py -m experiment=adam_lag_lab seed=0,1,2,3,4`. Runs that are missing are named.

    lab        adam_lag, adam_lag_wide, adam_lag_cosine, rate, depth, bad_data or continued
    seeds      seeds of the runs; default [0,1,2,3,4]
    runs       folder with the runs of experiments; default runs
    overrides  further settings that the runs were made with, each in quotes
    out        folder to write into; default labs/NAME in `runs`

    python scripts/make_lab.py lab=adam_lag "seeds=[0,1,2]"
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import time
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
from pydantic import Field

from common.console import make_console
from common.files import write_atomic
from common.settings import Allowed, Folder, Settings, parse
from common.text import quoted
from experiments.labs.bad_data_report import bad_data_report
from experiments.labs.continued_report import continued_report
from experiments.labs.declaration import LABS, ContinuedLab, Lab, RateLab, SpikeLab
from experiments.labs.rate_report import rate_report
from experiments.labs.report import LabReport
from experiments.labs.spike_report import spike_report
from experiments.run.collect import RunCollection
from experiments.run.style import image
from scripts._declared import LAB_SEEDS, Overrides, Seeds, collect_declared
from training.runtime.environment import environment


class LabSettings(Settings):
    """Settings of the command line."""

    lab: Annotated[str, Field(pattern=f"^({'|'.join(LABS)})$"), Allowed(f"one of {', '.join(LABS)}")]
    """Lab whose runs are read."""
    seeds: Seeds = LAB_SEEDS
    """Seeds of the runs."""
    runs: Folder = "runs"
    """Folder with the lab's folder of runs, `paths.runs` of train.py."""
    overrides: Overrides = Field(default_factory=list)
    """Further settings that the runs were made with, each in quotes."""
    out: Folder | None = None
    """Folder to write into; null: `labs/NAME` in `runs`."""


def main(values: _entry.Values) -> None:
    """Write report.md, numbers.csv and the figures."""
    settings = parse(LabSettings, values)
    console = make_console()
    lab = LABS[settings.lab]
    collection = collect_runs(lab, settings)
    made = f"Read {time.strftime('%Y-%m-%d')} at commit {str(environment()['commit'])[:8]}."
    written = lab_report(lab, collection, made)
    out = Path(settings.out or f"{settings.runs}/labs/{lab.name}")
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in written.figures.items():
        write_atomic(out / f"{name}.png", image(figure, "png", dpi=110))
        plt.close(figure)
    write_atomic(out / "numbers.csv", written.numbers)
    write_atomic(out / "report.md", written.text)
    for warning in collection.warnings:
        console.print(warning, style="yellow")
    console.print(f"report   {out / 'report.md'}")


def lab_report(lab: Lab, collection: RunCollection, made: str) -> LabReport:
    """Return the report of a lab of any kind; `made` says when it was made."""
    if isinstance(lab, SpikeLab):
        return spike_report(lab, collection, made)
    if isinstance(lab, RateLab):
        return rate_report(lab, collection, made)
    if isinstance(lab, ContinuedLab):
        return continued_report(lab, collection, made)
    return bad_data_report(lab, collection, made)


def collect_runs(lab: Lab, settings: LabSettings) -> RunCollection:
    """Return the runs of a lab; raise `UserError` if none is finished."""
    base = (f"experiment={lab.name}", f"paths.runs={quoted(settings.runs)}", *settings.overrides)
    problem = f"runs={settings.runs} has no finished run of lab={lab.name}"
    return collect_declared(lab.runs, base, settings.seeds, problem)


if __name__ == "__main__":
    _entry.run(main)
