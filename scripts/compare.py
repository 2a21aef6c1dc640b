"""Draw finished runs next to each other: `python scripts/compare.py run=runs/main [out=a.png]`.

    run  folder of an experiment, or a list of run folders; up to seven finished runs are compared
    out  file of the picture; default comparison.png in the folder of the runs

Losses, their differences if the runs saw the same batches, and gradient norms after clipping. A
sweep of train.py draws the same picture at its end.

    python scripts/compare.py run=runs/first-look
"""

import _entry  # first: it finds the checkout and installs the signal handlers

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.console import make_console
from common.errors import ConfigError, UserError, one_line
from common.settings import Allowed, Folder, PathText, Settings, parse
from experiments.run.compare import MAX_RUNS, compared, picture_path, plot_comparison, sentences
from experiments.run.read import Run, read_run
from experiments.run.summary import comparison
from training.config.checks import check_folder
from training.config.compose import saved_identity
from training.run_dir import RunDir


class CompareConfig(Settings):
    """Settings of the command line."""

    run: Annotated[
        Folder | Annotated[list[Folder], Field(min_length=1)],
        Allowed("the folder of an experiment, or a list of run folders"),
    ]
    """Folder of an experiment, or a list of run folders."""
    out: Annotated[PathText | None, Allowed("a file, or null")] = None
    """File of the picture; null: comparison.png in the folder of the runs."""


def main(values: _entry.Values) -> None:
    """Print the table and the sentence, and write the picture."""
    config = parse(CompareConfig, values)
    given = [Path(path) for path in (config.run if isinstance(config.run, list) else [config.run])]
    paths = list({run.resolve(): run for path in given for run in finished_runs(path)}.values())
    if not 1 < len(paths) <= MAX_RUNS:
        shown = [str(path) for path in given]
        problem = f"has {len(paths)} finished runs: 2 to {MAX_RUNS} can be compared; name them as run=[A,B]"
        raise ConfigError("run", shown[0] if len(shown) == 1 else shown, problem=problem)
    target = picture_path(paths) if config.out is None else Path(config.out)
    if target.is_dir() or target.suffix != ".png":
        raise ConfigError("out", target, problem="is not allowed: it must be a file that ends in .png")
    check_folder("out", str(target), target.parent)
    runs, identities = zip(*map(read, paths), strict=True)
    together = compared(runs, identities)
    console = make_console()
    rows = [({"run": one.label}, dict(one.run.result)) for one in together]
    console.print(comparison(rows, title="comparison", width=console.width), soft_wrap=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    plot_comparison(together, target)
    console.print(f"{sentences(together)}\npicture  {target}")


def finished_runs(path: Path) -> list[Path]:
    """Return the folder itself if it is one of a run, or else the finished runs in it."""
    if not path.is_dir():
        raise ConfigError("run", path, problem="does not exist: it must be a run folder, or a folder of such")
    if RunDir(path).config_file.is_file():
        if not RunDir(path).result_file.is_file():
            raise ConfigError("run", path, problem="is not finished: a comparison needs its result")
        return [path]
    return sorted(file.parent for file in path.glob("*/result.json") if (file.parent / "config.yaml").is_file())


def read(path: Path) -> tuple[Run, dict[str, Any]]:
    """Return the contents of a run folder and the run's identity; raise `UserError` if the folder is damaged."""
    try:
        run = read_run(path)
        return run, saved_identity(run.config)
    except (OSError, ValueError) as error:
        raise UserError(f"run={path} cannot be read ({one_line(error)})") from error


if __name__ == "__main__":
    _entry.run(main)
