"""Scripts as modules, whose functions a test calls in its own process."""

import importlib
import sys
from types import ModuleType

from tests.helpers import CHECKOUT, same_handlers


def load_script(name: str) -> ModuleType:
    """Import scripts/NAME.py as its own process would, and keep the signal handlers of the tests."""
    path = [*sys.path]
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        with same_handlers():
            return importlib.import_module(f"scripts.{name}")
    finally:
        sys.path[:] = path
