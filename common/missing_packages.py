"""Imports of packages that are not installed: each command of make installs only what it needs."""

import sys
from pathlib import Path
from types import TracebackType

from common.errors import EXIT_USER_ERROR

CHECKOUT = Path(__file__).resolve().parents[1]


def missing_package(error: BaseException) -> str | None:
    """Return what to do about the import of a package that is not installed; `None` for any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    name = error.name.partition(".")[0]
    if (CHECKOUT / name).exists() or (CHECKOUT / f"{name}.py").exists():
        return None
    return f"{name} is not installed: run `make setup`, and use .venv/bin/python"


def report_missing_packages() -> None:
    """Make an import that fails while the program loads end it with one sentence and status 2."""
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sentence = missing_package(error)
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
