"""The entry of every script. Import it before anything that takes seconds to load.

The import puts the checkout first on the path, in place of scripts/, whose modules may have the names of packages
(`evaluate`), and installs what reports signals and missing packages. `run` then runs the script's main function.
"""

import errno
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

#: Columns of what `--help` prints.
HELP_WIDTH = 100

_CHECKOUT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == _CHECKOUT / "scripts":
    sys.path[0] = str(_CHECKOUT)

from common.missing_packages import report_missing_packages
from training.runtime.signals import install_handlers

install_handlers()
report_missing_packages()

from common.errors import UserError
from common.settings import Values
from common.text import overrides_dict


def run(main: Callable[[Values], None], config: str | None = None) -> NoReturn:
    """Run a script's main function, report a mistake as one sentence, and exit with the script's status.

    Args:
        main: called with the settings as plain nested values.
        config: file below configs/ without its ending, such as "evaluate", from which Hydra composes the settings;
            `None`: the settings are the KEY=VALUE arguments of the command line.
    """
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(_help(inspect.getdoc(sys.modules["__main__"]) or "", config))
        sys.exit(0)
    from training.launch.cli import command_line

    sys.exit(command_line(_from_arguments(main) if config is None else _composed(main, config)))


def _help(documentation: str, config: str | None) -> str:
    """Return what `--help` prints: the script's documentation, its paragraphs wrapped, and the settings of a file."""
    paragraphs = re.split(r"\n\s*\n", documentation)
    lines = [p if re.search(r"^(    |- )", p, re.M) else textwrap.fill(p, HELP_WIDTH) for p in paragraphs]
    if config is not None:
        text = (_CHECKOUT / "configs" / f"{config}.yaml").read_text()
        sections = re.split(r"^(?=\S)", text, flags=re.M)
        settings = [s.rstrip() for s in sections if not re.match("defaults:|hydra:|#", s)]
        lines.append("\n".join(["Settings, and their defaults:", *filter(None, settings)]))
    return "\n\n".join(lines)


def _from_arguments(main: Callable[[Values], None]) -> Callable[[], None]:
    """Return a function that calls `main` with the command line's arguments."""
    from omegaconf import OmegaConf

    def called() -> None:
        with _short_names():
            main(_values(OmegaConf.from_cli(sys.argv[1:]), sys.argv[1:]))

    return called


def _composed(main: Callable[[Values], None], config: str) -> Callable[[], Any]:
    """Return a function that has Hydra compose a configuration and calls `main` with its values."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from training.launch.cli import reporting

    file = _CHECKOUT / "configs" / config

    @hydra.main(version_base="1.3", config_path=str(file.parent), config_name=file.name)
    @wraps(main)  # Hydra names the job after the file of `main`
    def task(cfg: Any) -> None:
        with reporting(), _short_names():
            main(_values(cfg, HydraConfig.get().overrides.task))

    return task


@contextmanager
def _short_names() -> Iterator[None]:
    """Make an error of the user of a path that no file system takes."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = max(str(error.filename).split("/"), key=len)
        raise UserError(f"{name[:40]}... is too long a name for a file or folder: choose a shorter one") from error


def _values(container: Any, overrides: Sequence[str]) -> Values:
    """Return the settings in OmegaConf's container, with the texts of the overrides."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(container, resolve=True, throw_on_missing=True)
    return Values(plain, overrides_dict(overrides))
