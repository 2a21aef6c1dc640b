"""The frame of every program: signals, exit statuses, and errors as one sentence on stderr.

Hydra reports errors over several lines with status 1. `command_line` makes it raise instead, and `reporting` prints one
sentence for errors of the user; program faults keep their traceback. With HYDRA_FULL_ERROR=1 every error has one.
"""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from common.console import printable_line
from common.errors import EXIT_CANNOT_CONTINUE, EXIT_USER_ERROR, RunError, UserError
from common.missing_packages import missing_package
from common.settings import fields_of, is_text
from training.config.schema import Config
from training.launch.hydra_errors import describe
from training.launch.processes import ERROR_REPORT_DELAY, ProcessFailed, Stopped, die_with_parent, report_failure
from training.runtime import signals, slurm
from training.runtime.distributed import check_environment, is_distributed, rank
from training.runtime.stdio import flush_stdio, install_best_effort_stdio

#: Error numbers that are no program faults: the disk is full, the quota is used up, a file is as large as it may be,
#: the file system is read-only, a file is a link, a device or a folder.
CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ELOOP, errno.ENXIO, errno.EISDIR,
)  # fmt: skip
#: The same of files that may be read or written: they belong to others, lie below a file, or on a disk that fails.
CANNOT_USE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE)

#: The user's HYDRA_FULL_ERROR. `command_line` sets that variable itself, and child processes inherit both.
_TRACEBACKS = "ZCLIP_TRACEBACKS"

#: Words that Hydra takes for numbers or truth values.
_NOT_READ_AS_TEXT = re.compile(r"[+-]?[\d_.]*\d[\d_.]*(e[+-]?\d+)?|[+-]?(inf|nan)|true|false", re.IGNORECASE)

#: Exit statuses of the errors that `reporting` has printed.
exit_statuses: list[int] = []
#: Sentences of errors in this process, which rank 0 may report too: it is then killed before it prints them.
_withheld: list[str] = []


def command_line(main: Callable[[], Any]) -> int:
    """Run a main function whose body is in `reporting`, and return the exit status of the process.

    Returns:
        0: success. 1: a process of a distributed run failed. 2: a user error was reported. 3: the run cannot continue,
        for the reason reported. 128 + n: signal n interrupted the program.
    """
    sys.argv[1:] = options_first(sys.argv[1:])
    if {"-m", "--multirun"} & {*sys.argv[1:]} and _program() != "train.py":
        print(f"{_program()}: error: -m is not possible: only train.py has sweeps", file=sys.stderr)
        return EXIT_USER_ERROR
    if {"-m", "--multirun"} & {*sys.argv[1:]}:
        sys.argv[1:] = quote_texts(sys.argv[1:])
    die_with_parent()
    install_best_effort_stdio()
    signals.install_handlers()
    slurm.export_torchrun_env()
    try:
        check_environment()
    except UserError as error:
        print(f"{_program()}: error: {printable_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    os.environ.setdefault(_TRACEBACKS, os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        signals.enable_exit()
        with reporting():
            main()
    except signals.Interrupted as error:
        signals.clear_pending()
        if rank() > 0 and slurm.started_by_srun():
            return 0  # with any other status, srun would end rank 0, which may be saving
        if rank() == 0:
            job = slurm.job_to_requeue(error.signum)
            if not isinstance(error, Stopped):
                signals.print_interrupted(error, requeued=job is not None)
            if job is not None:
                slurm.requeue(job)
        return 128 + error.signum
    else:
        if rank() > 0 and exit_statuses:
            with suppress(signals.Interrupted):  # the launcher ends all processes when one ends: it was rank 0
                time.sleep(ERROR_REPORT_DELAY)
                for sentence in _withheld:
                    print(f"process {rank()} of the run: {sentence}", file=sys.stderr)
        failures = [status for status in exit_statuses if status != EXIT_USER_ERROR]
        return (failures or exit_statuses or [0])[0]
    finally:
        flush_stdio()


def options_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a program with Hydra's options before the settings: argparse takes none between them."""
    actions = get_args_parser()._option_string_actions
    options: list[str] = []
    settings: list[str] = []
    option: Any = None  # that may take this argument as its value
    for argument in arguments:
        is_value = option is not None and (option.nargs is None or (option.nargs == "?" and argument in option.choices))
        if is_value or argument.startswith("-"):
            option = None if is_value else actions.get(argument)
            options.append(argument)
        else:
            option = None
            settings.append(argument)
    return options + settings


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a sweep in which texts that look like numbers are quoted.

    Hydra hands a job the values that it has read: `name=2024_01` as the number 202401.
    """
    keys = {key for key, field in fields_of(Config) if is_text(field.annotation)}
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.lstrip("+") in keys and not {*value} & {*"'\"\\()[]{}$"}:
            value = ",".join(f"'{word}'" if _NOT_READ_AS_TEXT.fullmatch(word) else word for word in value.split(","))
        quoted.append(f"{key}{equals}{value}")
    return quoted


@contextmanager
def reporting() -> Iterator[None]:
    """Print an error of the user, or why the run cannot continue, as one sentence. Later jobs of a sweep still run.

    An error without a message has been reported by another process.
    """
    try:
        yield
    except BaseException as error:
        signals.reraise_pending()
        if not isinstance(error, Exception):
            raise
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE + CANNOT_USE:
            verb = "written" if error.errno in CANNOT_WRITE else "used"
            what = f"{error.filename or 'a file'} cannot be {verb} ({error.strerror})"
            error = RunError(f"{what}: when it can, run the same command to resume")
        if missing := missing_package(error):
            error = UserError(missing)
        if isinstance(error, RunError):
            exit_statuses.append(1 if isinstance(error, ProcessFailed) else EXIT_CANNOT_CONTINUE)
            if str(error):
                _print_sentence(printable_line(error))
            return
        if not isinstance(error, UserError | HydraException | OmegaConfBaseException) and not _raised_by_hydra(error):
            if is_distributed():
                report_failure(error)
                os._exit(1)  # exit handlers would wait for the other processes for ever
            raise
        exit_statuses.append(EXIT_USER_ERROR)
        if isinstance(error, UserError) and not str(error):
            return
        if rank() == 0 and os.environ.get(_TRACEBACKS, "0") not in ("", "0"):
            traceback.print_exc()
        sentence = describe(error, sweeps=_program() == "train.py")
        _print_sentence(f"{_program()}: error: {printable_line(sentence)}")


def _print_sentence(sentence: str) -> None:
    """Print why the run ends; another process than rank 0 does so at its end, if it still lives then."""
    if rank() > 0:
        _withheld.append(sentence)
    else:
        print(sentence, file=sys.stderr)


def _program() -> str:
    return Path(sys.argv[0]).name


def _raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra failed, on an override or a folder of its own, and not the program that it runs."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).parents[2]
    started = any(Path(f.filename).parent in (ours, ours / "scripts") and f.name == "main" for f in frames)
    return not started and any("hydra" in Path(frame.filename).parts for frame in frames)
