"""From the command line's mistakes to one sentence and exit status 2.

Hydra reports errors over several lines with status 1. `command_line` asks it to raise instead, and `reporting`
says what a user needs; faults of the program keep their traceback. With HYDRA_FULL_ERROR=1 everything has one.
`CheckSweep` checks every job of a sweep before the first one starts.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from training.config import ConfigError, check, check_writable, run_path
from training.folder import RunFolder

_wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
_mistakes: list[Exception] = []


def command_line(main: Callable[[], Any]) -> int:
    """Run a Hydra main function, whose body stands in `reporting`, and return the process's exit status.

    Returns:
        0, or 2 if a mistake of the user's was reported on stderr.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with reporting():
        main()
    return 2 if _mistakes else 0


@contextmanager
def reporting() -> Iterator[None]:
    """Report a mistake in the configuration as one sentence; the other jobs of a sweep go on."""
    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        _mistakes.append(error)
        if _wants_traceback:
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: error: {sentence(error)}", file=sys.stderr)


def sentence(error: Exception) -> str:
    """Say in one line what was wrong with the input."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        known = ", ".join(error.options or ())
        return f"{group}={option} is not known: it must be one of {known}" if group else f"there is no {option}"
    message = str(error)
    if match := re.search(r"Could not override '([^']+)'", message):
        key = match.group(1)
        given = next((a for a in sys.argv[1:] if a.lstrip("+").split("=")[0] == key), key)
        return f"{given} is not possible: there is no key {key}; `--cfg job` lists all keys"
    return " ".join(message.split())


class CheckSweep(Callback):
    """Hydra callback: compose and check all jobs of a sweep, so that a bad one stops it before any work."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check each combination of the sweep's overrides; leave with status 2 at the first mistake."""
        with reporting():
            loader = GlobalHydra.instance().config_loader()
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
            (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
            for job in jobs:
                composed = loader.load_sweep_config(config, list(job))
                with open_dict(composed):
                    del composed["hydra"]
                check(composed)
                if not RunFolder(run_path(composed)).read_result():
                    check_writable(composed)
        if _mistakes:
            sys.exit(2)  # Hydra goes on after an exception in a callback
