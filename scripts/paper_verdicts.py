"""The verdicts on all claims, from the runs of the paper's experiments and those of the labs in `paths.runs`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.text import quoted
from experiments.claims.labs import LAB_CLAIMS
from experiments.claims.verdict import Verdict, corrected, judge
from experiments.labs.declaration import LABS, Lab
from experiments.paper.claims import PAPER_CLAIMS
from experiments.run.collect import RunCollection
from scripts._declared import LAB_SEEDS, find_declared
from scripts.paper_runs import PaperSettings


class Judged(NamedTuple):
    """What the runs say of the claims.

    Attributes:
        verdicts: on the paper's claims and those of the labs, with p-values that are corrected together.
        settings: words of the command that trains the paper's runs, such as `scale=micro` and `seed=0,1,2`.
        warnings: about runs of the labs.
    """

    verdicts: list[Verdict]
    settings: list[str]
    warnings: list[str]


def judge_claims(settings: PaperSettings, collection: RunCollection) -> Judged:
    """Return the verdicts on all claims. `collection` has the paper's runs; those of the labs are read here."""
    train = _train_settings(settings.paths.runs, collection, collection.seeds)
    words = [f"scale={settings.scale}", *settings.overrides, *train]
    verdicts = judge(PAPER_CLAIMS, collection, words)
    warnings = []
    for name, claims in LAB_CLAIMS.items():
        runs = _lab_runs(settings.paths.runs, LABS[name])
        verdicts += judge(claims, runs, _train_settings(settings.paths.runs, runs, LAB_SEEDS))
        warnings += runs.warnings
    return Judged(corrected(verdicts), words, warnings)


def _train_settings(runs: str, collection: RunCollection, seeds: Sequence[int]) -> list[str]:
    """Return the words that the commands of all runs have in common, but for the scale and the further settings."""
    folder = [] if runs == "runs" else [f"paths.runs={hydra_value(runs)}"]
    return [f"seed={','.join(map(str, seeds))}", *folder, *launcher(collection)]


def launcher(collection: RunCollection) -> list[str]:
    """Return the setting of the launcher: on CPUs, several runs at a time are faster."""
    on_cpus = all("CPU" in str(run.environment.get("device")) for run in collection.runs.values())
    return ["hydra/launcher=local"] if on_cpus else []


def hydra_value(text: str) -> str:
    """Return a text as Hydra's command line takes it, quoted only where it must be."""
    return text if re.fullmatch(r"[\w./~+-]+", text, re.ASCII) else quoted(text)


def _lab_runs(runs: str, lab: Lab) -> RunCollection:
    """Return the runs of a lab that exist, without composing their settings if there is no folder of them."""
    if not Path(runs, lab.name.replace("_", "-")).is_dir():
        return RunCollection({}, set(), {}, [], frozenset())
    return find_declared(lab.runs, (f"experiment={lab.name}", f"paths.runs={quoted(runs)}"), LAB_SEEDS)
