"""From the command line's mistakes to one sentence and exit status 2.

Hydra reports errors over several lines with status 1. `command_line` asks it to raise instead, and `reporting`
says what a user needs; faults of the program keep their traceback. With HYDRA_FULL_ERROR=1 everything has one.
`CheckSweep` checks every job of a sweep before the first one starts.
"""

import difflib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.errors import EXIT_CANNOT_CONTINUE, EXIT_USER_ERROR, RunError, UserError
from training.config.checks import CONFIGS
from training.launch.sweep import check_job, compose
from training.runtime import slurm
from training.runtime.distributed import (
    PATIENCE,
    AlreadyReported,
    ProcessFailed,
    Stopped,
    die_with_parent,
    is_distributed,
    rank,
    report_failure,
)
from training.runtime.signals import Interrupted, begin, end, install_handlers, reraise_pending, say
from training.runtime.stdio import close, install_best_effort_stdio

#: Numbers of errors that are nobody's fault: the disk is full, the quota used up, or it may only be read.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

#: What the user has asked for in HYDRA_FULL_ERROR, which `command_line` sets: processes that it starts inherit both.
_ASKED = "ZCLIP_TRACEBACKS"
_mistakes: list[Exception] = []
_failed: list[RunError] = []


def command_line(main: Callable[[], Any]) -> int:
    """Run a Hydra main function, whose body stands in `reporting`, and return the process's exit status.

    Returns:
        0; 1 if a process of a run of several failed; 2 if a mistake of the user's was reported on stderr; 3 if a run
        cannot go on, for a reason reported there; 128 + the signal's number if interrupted.
    """
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # argparse wants it first
    if sys.argv[1:2] in (["-m"], ["--multirun"]) and not _has_sweeps():
        print(f"{Path(sys.argv[0]).name}: error: -m is not possible: only train.py has sweeps", file=sys.stderr)
        return EXIT_USER_ERROR
    die_with_parent()
    install_best_effort_stdio()
    install_handlers()
    slurm.adopt()
    os.environ.setdefault(_ASKED, os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return _run(main)
    finally:
        close()


def _run(main: Callable[[], Any]) -> int:
    try:
        begin()
        with reporting():
            main()
    except Interrupted as stop:
        end()
        if rank() > 0 and slurm.started_by_srun():
            return 0  # any other status would have srun end rank 0, which may be saving
        if rank() == 0:
            queued = slurm.requeue(stop.signum)
            if not isinstance(stop, Stopped):
                say(stop, queued)
        return 128 + stop.signum
    if rank() > 0 and (_failed or _mistakes):
        time.sleep(PATIENCE)  # whoever started the processes ends all when one ends so, and rank 0 has to say why
    if _failed:
        return 1 if isinstance(_failed[0], ProcessFailed) else EXIT_CANNOT_CONTINUE
    return EXIT_USER_ERROR if _mistakes else 0


@contextmanager
def reporting() -> Iterator[None]:
    """Report a mistake in the configuration as one sentence; the other jobs of a sweep go on."""
    try:
        yield
    except BaseException as error:
        reraise_pending()
        if not isinstance(error, Exception):
            raise
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            where = error.filename or "a file"
            error = RunError(f"{where} cannot be written ({error.strerror}): once it can, the same command continues")
        if isinstance(error, RunError):
            _failed.append(error)
            if str(error) and rank() == 0:
                print(error, file=sys.stderr)
            return
        if not isinstance(error, UserError | HydraException | OmegaConfBaseException) and not _raised_by_hydra(error):
            if is_distributed():
                report_failure(error)
                os._exit(1)  # at once: what waits for the other processes would wait for ever
            raise
        _mistakes.append(error)
        if isinstance(error, AlreadyReported) or rank() > 0:
            return  # it has been said
        if os.environ.get(_ASKED, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: error: {sentence(error)}", file=sys.stderr)


def _has_sweeps() -> bool:
    return Path(sys.argv[0]).name == "train.py"


def _raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra itself failed, on an override or a folder of its own, and not what it was running."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).parents[2]
    started = any(Path(f.filename).parent in (ours, ours / "scripts") and f.name == "main" for f in frames)
    return not started and any("hydra" in Path(frame.filename).parts for frame in frames)


def sentence(error: Exception) -> str:
    """Say in one line what was wrong with the input."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        known = ", ".join(error.options or sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
        if known and group:
            return f"{group}={option} is not known: it must be one of {known}"
        return f"there is no configuration file {error.missing_cfg_file}.yaml in configs/"
    message = str(error)
    if not isinstance(error, UserError) and isinstance(error.__cause__, UserError):  # of what Hydra made, as a launcher
        return str(error.__cause__)
    if match := re.search(r"Error parsing override '([^']*)'\s+missing EQUAL", message):
        return f"{match.group(1)} is not allowed: settings are given as KEY=VALUE"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", message):
        several = "add -m to run a sweep, or quote the value" if _has_sweeps() else "give a list, as KEY=[0,1]"
        return f"{match.group(1)} is several values: {several}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read: what is not plain is quoted, as 'overrides=[\"trainer.max_steps=400\"]'"
        )
    if match := re.search(r"override must be a string or a list. Got (\w+)", message):
        groups = {file.parent.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("*.yaml")}
        wrong = [a for a in sys.argv[1:] if a.split("=")[0] in groups and not re.match(r"[a-z]", a.partition("=")[2])]
        wrong += [a for a in sys.argv[1:] if re.search(r"=(.*,)?(null|none|~|true|false)(,|$)", a, re.I)]
        return f"{wrong[0] if wrong else match.group(1)} is not allowed: a group takes the name of one of its options"
    if match := re.search(r"UserError raised while resolving interpolation: (.*?)\s+full_key: ", message, re.S):
        return match.group(1)
    if match := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{match.group(1)} is not set: give it as {match.group(1)}=..."
    if match := re.search(r"Could not override '([^']+)'", message):
        key = match.group(1)
        given = next((a for a in sys.argv[1:] if a.lstrip("+").split("=")[0] == key), key)
        lists = "hydra" if key.startswith("hydra.") else "job"
        inside = getattr(error.__cause__, "parent_node", None)  # where it was looked for
        last = str(getattr(error.__cause__, "key", key))
        near = difflib.get_close_matches(last, map(str, inside), 1) if isinstance(inside, DictConfig) else []
        meant = f" (the nearest is {key.removesuffix(last)}{near[0]})" if near and key.endswith(last) else ""
        return f"{given} is not possible: there is no key {key}{meant}; `--cfg {lists}` lists all keys"
    return " ".join(message.split())


class CheckSweep(Callback):
    """Hydra callback: compose and check all jobs of a sweep, so that a bad one stops it before any work."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check each combination of the sweep's overrides; leave with status 2 at the first mistake."""
        with reporting():
            loader: Any = GlobalHydra.instance().config_loader()
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
            sweeper: Any = get_class(config.hydra.sweeper._target_)
            (jobs,) = sweeper.split_arguments(overrides, max_batch_size=None)
            if not jobs:
                raise UserError(f"{' '.join(config.hydra.overrides.task)} makes no job: a value must match something")
            seen: dict[Path, list[str]] = {}
            for job in (compose(loader, config, given) for given in jobs):
                check_job(job)
                path = job.folder.path
                if path in seen and job.cfg.name is None and config.paper.suite is None:
                    raise UserError(f"two jobs of the sweep are the same run, {path}: give each value once")
                if path in seen and job.cfg.name is not None:
                    raise UserError(
                        f"name={job.cfg.name} would be shared by the jobs ({' '.join(seen[path])}) and "
                        f"({' '.join(job.overrides)}): leave the name out, and each has its own"
                    )
                seen[path] = job.overrides
        if _mistakes:
            sys.exit(2)  # Hydra goes on after an exception in a callback
