"""Fixtures of the tests of training: `train.py` in the test's process, where its output is not the subject."""

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

from common.errors import EXIT_USER_ERROR
from tests.helpers import same_handlers
from training.config.checks import check
from training.config.compose import CONFIGS
from training.config.schema import Config
from training.launch import cli
from training.launch import sweep as sweeps
from training.run_dir import RunDir


@pytest.fixture(scope="session")
def program() -> ModuleType:
    """The module train.py."""
    torch.set_num_threads(1)  # as in other processes: sums of another number of threads are rounded differently
    with same_handlers():
        import train

    return train


@pytest.fixture
def checked(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Config, RunDir]]:
    """Return a function that composes a run and checks it as train.py does before it begins."""

    def composed(*overrides: str) -> tuple[Config, RunDir]:
        monkeypatch.setattr("sys.argv", ["train.py", *overrides])
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config, run_dir = program.configured(compose("train", list(overrides)), list(overrides))
        check(config, run_dir.path)
        return config, run_dir

    return composed


@pytest.fixture
def refusal(
    checked: Callable[..., tuple[Config, RunDir]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that returns the line with which train.py refuses a command line."""

    def refused(*overrides: str) -> str:
        cli.exit_statuses.clear()
        with cli.reporting():
            checked(*overrides)
        statuses = cli.exit_statuses.copy()
        cli.exit_statuses.clear()
        output, errors = capsys.readouterr()
        assert (statuses, output) == ([EXIT_USER_ERROR], ""), errors
        (line,) = errors.splitlines()
        return line

    monkeypatch.delenv("ZCLIP_TRACEBACKS", raising=False)
    return refused


@pytest.fixture
def run_in_process(
    program: ModuleType,
    checked: Callable[..., tuple[Config, RunDir]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Return a function that trains in the test's folder as train.py does; it returns the result and the output.

    Errors are raised. A run that is finished is not shown, but trained again from its last checkpoint.
    """

    def trained(*overrides: str) -> tuple[dict[str, Any], str]:
        monkeypatch.chdir(tmp_path)
        config, run_dir = checked(*overrides)
        output = io.StringIO()
        console = Console(file=output, soft_wrap=True, highlight=False, markup=False)
        with isolate_rng():
            return program.run(config, run_dir, console, None), output.getvalue()

    return trained


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes the launcher or the sweeper of train.py with these overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "completed_jobs", [])

    def make(kind: str, *overrides: str) -> Any:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration("train", [*overrides], RunMode.MULTIRUN)
            context = HydraContext(config_loader=loader, callbacks=Callbacks())
            instantiate = getattr(Plugins.instance(), f"instantiate_{kind}")
            return instantiate(hydra_context=context, task_function=None, config=config)

    return make
