"""Written runs: those of Table 3, and those of all experiments."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from common.settings import parse
from experiments.paper.collect import ExpectedRun, RunCollection, collect
from experiments.paper.tables_and_figures import STRATEGIES, SUITES
from tests.helpers import CHECKOUT
from training.config.compose import container, saved_identity, to_yaml
from training.config.identity import identity, run_path
from training.config.schema import Config

CORRUPTED_STEPS = [80, 100, 120]
SMALL = ("trainer.max_steps=140", f"paper.corruption_steps={CORRUPTED_STEPS}", f"paper.lab_steps={CORRUPTED_STEPS}")
SEEDS = (0, 1, 2)
#: Excess loss of Table 3's strategies after a corrupted batch.
BUMPS = {"No clipping": 2.0, "Fixed 1.0": 0.3, "AutoClip": 0.1, "ZClip": 0.0}


def overrides(spec, runs: Path) -> list[str]:
    return ["experiment=paper", "scale=micro", *SMALL, *spec.overrides, f"paths.runs={runs}"]


def expected_runs(specs, runs: Path, seeds=SEEDS) -> dict:
    """Return each expected run with its configuration, by spec and seed."""
    expected = {}
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        for spec in dict.fromkeys(specs):
            plain = container(compose("train", overrides(spec, runs)))
            for seed in seeds:
                config = parse(Config, plain | {"seed": seed})
                expected[spec, seed] = ExpectedRun(run_path(config), identity(config)), config
    return expected


def with_settings(config: Config, settings: dict) -> Config:
    """Return a configuration with other settings, by dotted key."""
    plain = config.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = plain
        for part in sections:
            section = section[part]
        section[name] = value
    return parse(Config, plain)


def write_run(path: Path, config: Config, seed: int, bump: float = 0.0, done: bool = True, **result) -> None:
    """Write a run whose loss falls from 6 to 5, plus `bump` for five steps after corrupted batches."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    rng = np.random.default_rng(seed)
    steps = config.trainer.max_steps
    corrupted = set(config.data.corruption.steps)
    loss = np.linspace(6, 5, steps) + rng.normal(0, 0.02, steps)
    norm = rng.normal(0.36, 0.02, steps)
    for step in corrupted:
        loss[step - 1], norm[step - 1] = 9.0, 5.0
        loss[step : step + 5] += bump
    spike_period = int(20 * config.clip.arguments.get("z_thresh", 100))
    rows = [
        {
            "step": i + 1, "tokens": 2048 * (i + 1), "loss": loss[i], "grad_norm": norm[i], "clipped": float(i < 14),
            "clipped_norm": min(norm[i], 1.0), "tokens_per_second": 1e4, "z": 0.0, "mean": 0.4, "std": 0.1,
            "spike": float(i % spike_period == 1),
        }
        for i in range(steps)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"commit": "0123456789abcdef", "uncommitted_changes": False, "versions": {"torch": "2"}, "device": "a CPU"}
    (path / "environment.json").write_text(json.dumps({"starts": [start]}))
    if done:
        numbers = {
            "steps": steps, "tokens": 2048 * steps, "train_loss": 5.0 + bump, "test_loss": 4.9 + bump + seed / 100,
            "parameters": 640_000, "data_fingerprint": "abcd", "clipped_share": 0.1, "clipped_by_z": 7,
            "tokens_per_second": 1e4, "step_seconds": {"data": 0.0, "forward_backward": 0.98, "clip": 0.02},
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(numbers | result))


def score(path: Path, task: str, items: int, **metrics: float) -> None:
    file = path / "task_scores.json"
    scores = json.loads(file.read_text())["scores"] if file.exists() else []
    scores.append({"task": task, "num_fewshot": 0, "step": 140, "items": items, **metrics})
    file.write_text(json.dumps({"scores": scores}))


@pytest.fixture(scope="module")
def table3(tmp_path_factory) -> tuple[Path, dict]:
    """The runs of Table 3 with three seeds: folder, and expected runs."""
    runs = tmp_path_factory.mktemp("runs")
    places = expected_runs(STRATEGIES.values(), runs)
    for label, spec in STRATEGIES.items():
        for seed in SEEDS:
            place, config = places[spec, seed]
            write_run(place.path, config, seed, BUMPS[label])
            score(place.path, "winogrande", 100, acc=0.5 + seed / 100)
            score(place.path, "winogrande", 50, acc=0.1)
            score(place.path, "hellaswag", 100, acc=0.3, acc_norm=0.25)
    return runs, {key: place for key, (place, _) in places.items()}


@pytest.fixture(scope="session")
def everything(tmp_path_factory) -> RunCollection:
    """The runs of all experiments with three seeds. Excess losses are smaller with stronger clipping."""
    runs = tmp_path_factory.mktemp("all")
    places = expected_runs(SUITES["all"], runs)
    for (spec, seed), (place, config) in places.items():
        if not place.path.exists():
            bump = {"none": 0.8, "fixed": 0.3}.get(spec.clip, 0.05)
            bump = bump * (1 + seed / 10) if config.data.corruption.steps else 0.0
            clip = config.clip.arguments
            loss = 5.0 + bump + clip.get("z_thresh", 0) / 100 + clip.get("alpha", 0) / 10
            write_run(place.path, config, seed, bump, train_loss=loss)
            score(place.path, "hellaswag", 100, acc=0.1, acc_norm=config.lr + seed / 100, acc_norm_stderr=0.04)
            score(place.path, "winogrande", 100, acc=0.5 + 0.1 * clip.get("alpha", 0), acc_stderr=0.05)
    return collect({key: place for key, (place, _) in places.items()}, saved_identity)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")
