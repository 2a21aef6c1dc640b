"""Scripts as modules, whose functions a test calls in its own process."""

import importlib
import signal
import sys
from types import ModuleType

from tests.helpers import CHECKOUT
from training.runtime.signals import SIGNALS


def load_script(name: str) -> ModuleType:
    """Import scripts/NAME.py as its own process would, and keep the signal handlers of the tests."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    path = [*sys.path]
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        return importlib.import_module(f"scripts.{name}")
    finally:
        sys.path[:] = path
        for number, handler in handlers.items():
            signal.signal(number, handler)
