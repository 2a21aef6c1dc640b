"""One page with what the runs say: `python scripts/make_report.py scale=micro [seeds=[0,1,2]]` writes report.html.

It needs no network, and no other file; its verdicts are in verdicts.md too. Of some tables and figures alone it is
report-table3-figure2.html, beside that of all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)

from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load

import json
import shlex
import time
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig
from rich.console import Console

from common.files import write_atomic
from evaluation.tasks import SETS
from experiments.paper.claims import verdicts
from experiments.paper.collect import Found
from experiments.paper.report import report, verdicts_in_markdown
from experiments.paper.suites import TABLES
from scripts.paper_runs import EVERYTHING, PICTURES, chosen, drawn, gather, out_folder, step_windows
from training.launch.cli import command_line, reporting
from training.run_dir import environment


def _limits(found: Found) -> list[str]:
    """Return the setting of evaluate.py that the scores were made with; none for all items, or for no scores."""
    scores = [score for run in found.runs.values() for task in SETS if (score := run.score(task)) is not None]
    some = [score["items"] for score in scores if score["items"] < SETS[score["task"]].items]
    return [f"eval.limit={min(some)}"] if some else []


def _is_all(wanted: Sequence[str]) -> bool:
    return set(wanted) == {*EVERYTHING}


def _commands(cfg: DictConfig, found: Found, wanted: Sequence[str], windows: list[tuple[int, int]] | None) -> list[str]:
    """Return the commands that make the runs, and what is made of them, again."""
    seeds = ",".join(map(str, found.seeds))
    where = f"paths.runs={cfg.paths.runs}"
    everything = _is_all(wanted)
    asked = "experiment=all" if everything else f"experiment=[{','.join(wanted)}]"
    trained = (
        "experiment=all" if everything else f"experiment=[{','.join(each for each in wanted if each != 'figure3')}]"
    )
    on_cpus = all("CPU" in str(run.environment.get("device")) for run in found.runs.values())
    side_by_side = ["hydra/launcher=local"] if on_cpus else []  # several at a time are faster
    readers = [asked, f"scale={cfg.scale}", f"seeds=[{seeds}]", where]
    readers += [f"overrides=[{','.join(json.dumps(each) for each in cfg.overrides)}]"] if cfg.overrides else []
    readers += [] if cfg.out is None else [f"out={cfg.out}"]
    seen = [f"windows={json.dumps(windows)}".replace(" ", "")] if windows else []
    commands = [
        [
            "python",
            "train.py",
            "-m",
            trained,
            f"scale={cfg.scale}",
            f"seed={seeds}",
            where,
            *cfg.overrides,
            *side_by_side,
        ],
        ["python", "scripts/eval_data.py"],
        ["python", "scripts/evaluate.py", f"run={cfg.paths.runs}/paper-{cfg.scale}", *_limits(found)],
    ]
    if any(name in TABLES for name in wanted):
        commands.append(["python", "scripts/make_tables.py", *readers])
    if any(name in PICTURES for name in wanted):
        commands.append(["python", "scripts/make_figures.py", *readers, *seen])
    return [shlex.join(each) for each in [*commands, ["python", "scripts/make_report.py", *readers, *seen]]]


@hydra.main(version_base="1.3", config_path="../configs/paper", config_name="results")
def main(cfg: DictConfig) -> None:
    """Write the report, and say where it is."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        wanted = chosen(cfg)
        windows = step_windows(cfg)
        found = gather(cfg)
        folder = out_folder(cfg)
        figures, undrawn = drawn(wanted, found, windows)
        tables = [TABLES[name] for name in wanted if name in TABLES]
        here = environment()
        commands = _commands(cfg, found, wanted, windows)
        made = f"Made {time.strftime('%Y-%m-%d')} at commit {str(here['commit'])[:8]}, on {here['device']}."
        judged = verdicts(found)
        write_atomic(folder / "verdicts.md", verdicts_in_markdown(found, judged, cfg.scale))
        name = "report.html" if _is_all(wanted) else f"report-{'-'.join(wanted)}.html"
        write_atomic(folder / name, report(found, judged, tables, figures, undrawn, cfg.scale, commands, made))
        for said in found.others:
            console.print(said, style="yellow")
        console.print(f"report   {folder / name}")


if __name__ == "__main__":
    sys.exit(command_line(main))
