"""The report on the paper's claims: `python scripts/make_report.py scale=micro [seeds=[0,1,2]]` writes report.html.

The page is self-contained; its verdicts are in verdicts.md too. They are on the paper's claims, and on further
ones that the labs' runs in `paths.runs` test. With `experiment=[table3,figure2]` the page has only these tables and
figures, and is named report-table3-figure2.html.

    python scripts/make_report.py scale=micro
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import json
import shlex
import time
from collections.abc import Sequence

from common.console import make_console
from common.files import write_atomic
from common.settings import parse
from common.text import quoted
from evaluation.last_word import NAME as LAST_WORD
from evaluation.tasks import SETS
from experiments.paper.report import report, verdicts_markdown
from experiments.paper.tables_and_figures import TABLES
from experiments.run.collect import RunCollection
from scripts.paper_runs import ALL_NAMES, FIGURE_NAMES, PaperSettings, collect_runs, draw_figures
from scripts.paper_verdicts import hydra_value, judge_claims, launcher
from training.runtime.environment import environment


def _score_overrides(collection: RunCollection) -> list[str]:
    """Return the overrides of evaluate.py for these scores; empty if they are on all items of the default tasks."""
    scores = [score for run in collection.runs.values() for task in SETS if (score := run.score(task)) is not None]
    limited = [score["items"] for score in scores if score["items"] < SETS[score["task"]].items]
    has_last_words = any(run.score(LAST_WORD) is not None for run in collection.runs.values())
    tasks = [f"eval.tasks=[{','.join([*SETS, LAST_WORD])}]"] if has_last_words else []
    return [*tasks, *([f"eval.limit={min(limited)}"] if limited else [])]


def _double_quoted(text: str) -> str:
    """Return a text in double quotes, as an element of a list on Hydra's command line, if it has none itself."""
    return quoted(text) if {*'"\\'} & {*text} else f'"{text}"'


def _commands(settings: PaperSettings, collection: RunCollection, names: Sequence[str]) -> list[str]:
    """Return the commands that make the runs and the report again."""
    seeds = ",".join(map(str, collection.seeds))
    scale, runs = f"scale={settings.scale}", f"paths.runs={hydra_value(settings.paths.runs)}"
    made = trained = "experiment=all"
    if set(names) != {*ALL_NAMES}:
        made, trained = (f"experiment=[{','.join(some)}]" for some in (names, [n for n in names if n != "figure3"]))
    readers = [made, scale, f"seeds=[{seeds}]", runs]
    readers += [f"overrides=[{','.join(map(_double_quoted, settings.overrides))}]"] if settings.overrides else []
    readers += [] if settings.out is None else [f"out={hydra_value(settings.out)}"]
    windows = [f"windows={json.dumps(settings.windows)}".replace(" ", "")] if settings.windows else []
    scored = f"run={hydra_value(f'{settings.paths.runs}/paper-{settings.scale}')}"
    commands = [
        ["train.py", "-m", trained, scale, f"seed={seeds}", runs, *settings.overrides, *launcher(collection)],
        ["scripts/eval_data.py"],
        ["scripts/evaluate.py", scored, *_score_overrides(collection)],
        ["scripts/make_tables.py", *readers] if {*names} & {*TABLES} else [],
        ["scripts/make_figures.py", *readers, *windows] if {*names} & {*FIGURE_NAMES} else [],
        ["scripts/make_report.py", *readers, *windows],
    ]
    return [shlex.join(["python", *words]) for words in commands if words]


def main(values: _entry.Values) -> None:
    """Write the report and the verdicts, and print where they are."""
    console = make_console()
    settings = parse(PaperSettings, values)
    names = settings.selected()
    collection = collect_runs(settings, ["all"])  # verdicts are on all claims
    folder = settings.out_folder()
    figures, not_drawn = draw_figures(names, collection, settings.windows)
    tables = [TABLES[name] for name in names if name in TABLES]
    here = environment()
    made = f"Made {time.strftime('%Y-%m-%d')} at commit {str(here['commit'])[:8]}, on {here['device']}."
    commands = _commands(settings, collection, names)
    verdicts, words, warnings = judge_claims(settings, collection)
    write_atomic(folder / "verdicts.md", verdicts_markdown(collection, verdicts, settings.scale))
    file = folder / ("report.html" if set(names) == {*ALL_NAMES} else f"report-{'-'.join(names)}.html")
    page = report(collection, verdicts, tables, figures, not_drawn, settings.scale, commands, made, words, warnings)
    write_atomic(file, page)
    for warning in [*collection.warnings, *warnings]:
        console.print(warning, style="yellow")
    console.print(f"report   {file}")


if __name__ == "__main__":
    _entry.run(main, "paper/results")
