"""Keep finished runs as small archives, or restore them: `python scripts/archive.py experiment=NAME`.

    experiment  folder of the runs in `runs`, and of their archives
    restore     true: make run folders of archives; default false: make archives of finished runs
    runs        folder with the runs of experiments; default runs
    archives    folder with the archives of experiments; default experiments/results/runs

An archive has what tables and figures read, with numbers of 5 digits; it has no checkpoints. A
restored run counts as finished: readers read it, and train.py does not train it again. What exists
already is left as it is. What cannot be archived or restored is named, and the rest is done.

    python scripts/archive.py experiment=adam-lag restore=true
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import os
import re
from collections.abc import Iterable
from pathlib import Path

from common.console import make_console
from common.errors import ConfigError, UserError, one_line
from common.files import REMOVING, SAVING
from common.settings import FOLDER_NAME, Flag, Folder, FolderName, Settings, parse
from experiments.run.archive import ENDING, read_archive, restore_archive, write_archive
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
        sources = _without_leftovers(archives.glob(f"*{ENDING}"))
        pairs = [(archive, runs / archive.name.removesuffix(ENDING)) for archive in sources]
        _require(pairs, "archives", settings.archives, f"has no archives of experiment={settings.experiment}")
    else:
        sources = _without_leftovers(run for run in runs.glob("*") if RunDir(run).result_file.is_file())
        pairs = [(run, archives / f"{run.name}{ENDING}") for run in sources]
        _require(pairs, "runs", settings.runs, f"has no finished run of experiment={settings.experiment}")
    counts = {True: 0, False: 0}  # of what was made, and of what was there already
    problems = []
    for source, target in pairs:
        try:
            counts[_make(source, target, restore=settings.restore)] += 1
        except (OSError, ValueError) as error:
            problems.append(f"{source} cannot be {_done(settings)} ({one_line(error)})")
    made, were = f"{counts[True]} run{'' if counts[True] == 1 else 's'}", "was" if counts[False] == 1 else "were"
    place = runs if settings.restore else archives
    make_console().print(f"{made} {_done(settings)}, {counts[False]} {were} there already: {place}")
    if problems:
        raise UserError("; ".join(problems))


def _without_leftovers(paths: Iterable[Path]) -> list[Path]:
    """Return the paths in order, but for what a killed process was writing or removing."""
    return sorted(path for path in paths if not path.name.startswith((SAVING, REMOVING)))


def _make(source: Path, target: Path, *, restore: bool) -> bool:
    """Archive or restore one run; return whether that was done, and not before.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the source is damaged, its name is not that of a run, or something else is in the target's place.
    """
    name = source.name.removesuffix(ENDING) if restore else source.name
    if not re.fullmatch(FOLDER_NAME, name):
        raise ValueError(f"{name!r} is no name of a run: it must have only letters, digits and . _ = , + -")
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        (restore_archive if restore else write_archive)(source, target)
        return True
    if restore and not RunDir(target).result_file.is_file():
        raise ValueError(f"{target} is there, and is no finished run: move it away")
    if not restore:
        _check_archive(target)
    return False


def _check_archive(archive: Path) -> None:
    """Raise `ValueError` if what stands in the place of an archive is none."""
    try:
        read_archive(archive)
    except (OSError, ValueError) as error:
        raise ValueError(f"{archive} is there, and is no archive: {one_line(error)}; move it away") from error


def _done(settings: ArchiveSettings) -> str:
    return "restored" if settings.restore else "archived"


def _require(pairs: list[tuple[Path, Path]], key: str, value: str, problem: str) -> None:
    if not pairs:
        raise ConfigError(key, value, problem=problem)


if __name__ == "__main__":
    _entry.run(main)
