"""The export of the finished run, and evaluate.py in the process of the test."""

from collections.abc import Callable, Iterator
from logging import getLogger
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.helpers import CHECKOUT, script
from tests.scripts.loading import load_script


@pytest.fixture(scope="session")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run in Hugging Face's format. A test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp("exported")
    done = script("export_hf.py", f"run={finished_run}", "out=exported", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder / "exported"


@pytest.fixture
def evaluate() -> Iterator[Callable[..., None]]:
    """Run the main function of evaluate.py with overrides. The libraries are imported once."""
    level = getLogger().level

    def run(*overrides: str) -> None:
        with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
            values = OmegaConf.to_container(compose("evaluate", list(overrides)), resolve=True)
        load_script("evaluate").main(values)

    yield run
    getLogger().setLevel(level)
