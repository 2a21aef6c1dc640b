"""Runs that the tests of experiments read: those of Table 3 as files, and those of all experiments."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from experiments.paper.figures import FIGURES
from experiments.paper.tables_and_figures import STRATEGIES, SUITES
from experiments.run.collect import ExpectedRun, Key, RunCollection
from tests.experiments.written_runs import (
    BASE,
    COMPOSITIONS,
    SEEDS,
    SMALL,
    composed,
    expected_runs,
    places,
    run_of,
    score,
    write_run,
)
from tests.helpers import Once

#: Excess loss of Table 3's strategies after a corrupted batch.
BUMPS = {"No clipping": 2.0, "Fixed 1.0": 0.3, "AutoClip": 0.1, "ZClip": 0.0}


@pytest.fixture(scope="session")
def table3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Key, ExpectedRun]]:
    """The files of Table 3's runs with three seeds: folder, and expected runs. A test that changes them copies them."""
    runs = tmp_path_factory.mktemp("runs")
    expected = expected_runs(STRATEGIES.values(), runs)
    for label, spec in STRATEGIES.items():
        for seed in SEEDS:
            place, config = expected[spec, seed]
            scores = [
                score("winogrande", 100, acc=0.5 + seed / 100),
                score("winogrande", 50, acc=0.1),
                score("hellaswag", 100, acc=0.3, acc_norm=0.25),
            ]
            write_run(place.path, config, seed, BUMPS[label], scores=scores)
    return runs, places(expected)


@pytest.fixture(scope="session")
def compositions(once: Once) -> None:
    """Compose the configurations of all experiments, once for all pytest workers: Hydra takes seconds."""

    def fill(folder: Path) -> None:
        for spec in SUITES["all"]:
            composed(*BASE, *SMALL, *spec.overrides)
        (folder / "compositions.pickle").write_bytes(pickle.dumps(COMPOSITIONS))

    COMPOSITIONS.update(pickle.loads((once("compositions", fill) / "compositions.pickle").read_bytes()))


@pytest.fixture(scope="session")
def everything(compositions: None, tmp_path_factory: pytest.TempPathFactory) -> RunCollection:
    """The runs of all experiments with three seeds. Excess losses are smaller with stronger clipping."""
    runs = {}
    for (spec, seed), (place, config) in expected_runs(SUITES["all"], tmp_path_factory.mktemp("all")).items():
        bump = {"none": 0.8, "fixed": 0.3}.get(spec.clip, 0.05)
        bump = bump * (1 + seed / 10) if config.data.corruption.steps else 0.0
        clip = config.clip.arguments
        loss = 5.0 + bump + clip.get("z_thresh", 0) / 100 + clip.get("alpha", 0) / 10
        scores = [
            score("hellaswag", 100, acc=0.1, acc_norm=config.lr + seed / 100, acc_norm_stderr=0.04),
            score("winogrande", 100, acc=0.5 + 0.1 * clip.get("alpha", 0), acc_stderr=0.05),
            score("last_word", 1700, loss=5.5 + bump, loss_stderr=0.07, acc=0.1, acc_stderr=0.01),
        ]
        runs[spec, seed] = run_of(place.path, config, seed, bump, scores, train_loss=loss)
    return RunCollection(runs, diverged=set(), unfinished={}, warnings=[], excluded=frozenset())


@pytest.fixture(scope="session")
def figures(everything: RunCollection) -> dict[str, Figure]:
    """Every figure of the runs of all experiments."""
    return {name: draw(everything) for name, draw in FIGURES.items()}


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")
