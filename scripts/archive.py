"""Keep finished runs as small archives, or restore them: `python scripts/archive.py experiment=NAME`.

    experiment  folder of the runs in `runs`, and of their archives
    restore     true: make run folders of archives; default false: make archives of finished runs
    runs        folder with the runs of experiments; default runs
    archives    folder with the archives of experiments; default experiments/results/runs

An archive has what tables and figures read, with numbers of 6 digits; it has no checkpoints. A
restored run counts as finished: readers read it, and train.py does not train it again. What exists
already is left as it is.

    python scripts/archive.py experiment=adam-lag restore=true
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import os
import re
from pathlib import Path

from common.console import make_console
from common.errors import ConfigError, UserError, one_line
from common.settings import FOLDER_NAME, Flag, Folder, FolderName, Settings, parse
from experiments.run.archive import ENDING, restore_archive, write_archive
from training.run_dir import RunDir

#: The checkout's archives.
ARCHIVES = str(Path(__file__).resolve().parents[1] / "experiments" / "results" / "runs")


class ArchiveSettings(Settings):
    """Settings of the command line."""

    experiment: FolderName
    """Folder of the runs in `runs`, and of their archives."""
    restore: Flag = False
    """true: make the run folders of the archives; false: make the archives of finished runs."""
    runs: Folder = "runs"
    """Folder with the runs of experiments, `paths.runs` of train.py."""
    archives: Folder = ARCHIVES
    """Folder with the archives of experiments."""


def main(values: _entry.Values) -> None:
    """Archive or restore what is missing, and print how many there are."""
    settings = parse(ArchiveSettings, values)
    runs, archives = (Path(folder) / settings.experiment for folder in (settings.runs, settings.archives))
    if settings.restore:
        names = [file.name.removesuffix(ENDING) for file in sorted(archives.glob(f"*{ENDING}"))]
        pairs = [(archives / f"{name}{ENDING}", runs / name) for name in names if re.fullmatch(FOLDER_NAME, name)]
        _require(pairs, "archives", settings.archives, f"has no archives of experiment={settings.experiment}")
    else:
        finished = [run for run in sorted(runs.glob("*")) if RunDir(run).result_file.is_file()]
        pairs = [(run, archives / f"{run.name}{ENDING}") for run in finished]
        _require(pairs, "runs", settings.runs, f"has no finished run of experiment={settings.experiment}")
    missing = [(source, target) for source, target in pairs if not os.path.lexists(target)]
    problems = [problem for source, target in missing if (problem := _made(source, target, settings))]
    made, kept = len(missing) - len(problems), len(pairs) - len(missing)
    make_console().print(f"{made} runs {_done(settings)}, {kept} were there already: {pairs[0][1].parent}")
    if problems:
        raise UserError("; ".join(problems))


def _made(source: Path, target: Path, settings: ArchiveSettings) -> str:
    """Archive or restore one run; return what is wrong with it, or an empty text."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (restore_archive if settings.restore else write_archive)(source, target)
    except (OSError, ValueError) as error:
        return f"{source} cannot be {_done(settings)} ({one_line(error)})"
    return ""


def _done(settings: ArchiveSettings) -> str:
    return "restored" if settings.restore else "archived"


def _require(pairs: list[tuple[Path, Path]], key: str, value: str, problem: str) -> None:
    if not pairs:
        raise ConfigError(key, value, problem=problem)


if __name__ == "__main__":
    _entry.run(main)
