"""Runs to read: of Table 3, and of all experiments."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.paper.collect import Expected, Found, collect
from experiments.paper.suites import STRATEGIES, sets
from tests.conftest import CHECKOUT
from training.config.checks import identity, run_path

BAD = [80, 100, 120]
SMALL = ("trainer.max_steps=140", f"paper.corruption_steps={BAD}", f"paper.lab_steps={BAD}")
SEEDS = (0, 1, 2)
#: By how much the loss of Table 3's strategies is higher after a bad batch.
BUMPS = {"No clipping": 2.0, "Fixed 1.0": 0.3, "AutoClip": 0.1, "ZClip": 0.0}


def overrides(setting, runs: Path) -> list[str]:
    return ["experiment=paper", "scale=micro", *SMALL, *setting.overrides, f"paths.runs={runs}"]


def expected(settings, runs: Path, seeds=SEEDS) -> dict:
    found = {}
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        for setting in dict.fromkeys(settings):
            cfg = compose("train", overrides(setting, runs))
            for seed in seeds:
                one = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
                one.seed = seed
                found[setting, seed] = Expected(run_path(one), identity(one)), one
    return found


def write_run(path: Path, cfg, seed: int, bump: float = 0.0, done: bool = True, **result) -> None:
    """Write a run whose loss falls from 6 to 5, and is higher by `bump` for five steps after bad batches."""
    path.mkdir(parents=True)
    OmegaConf.save(cfg, path / "config.yaml")
    rng = np.random.default_rng(seed)
    steps = cfg.trainer.max_steps
    bad = set(cfg.data.corruption.steps)
    loss = np.linspace(6, 5, steps) + rng.normal(0, 0.02, steps)
    norm = rng.normal(0.36, 0.02, steps)
    for step in bad:
        loss[step - 1], norm[step - 1] = 9.0, 5.0
        loss[step : step + 5] += bump
    often = int(20 * cfg.clip.get("z_thresh", 100))
    rows = [
        {
            "step": i + 1, "tokens": 2048 * (i + 1), "loss": loss[i], "grad_norm": norm[i], "clipped": float(i < 14),
            "clipped_norm": min(norm[i], 1.0), "tokens_per_second": 1e4, "z": 0.0, "mean": 0.4, "std": 0.1,
            "spike": float(i % often == 1),
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
    """The runs of Table 3 with three seeds."""
    runs = tmp_path_factory.mktemp("runs")
    places = expected(STRATEGIES.values(), runs)
    for label, setting in STRATEGIES.items():
        for seed in SEEDS:
            place, cfg = places[setting, seed]
            write_run(place.path, cfg, seed, BUMPS[label])
            score(place.path, "winogrande", 100, acc=0.5 + seed / 100)
            score(place.path, "winogrande", 50, acc=0.1)
            score(place.path, "hellaswag", 100, acc=0.3, acc_norm=0.25)
    return runs, {key: place for key, (place, _) in places.items()}


@pytest.fixture(scope="session")
def everything(tmp_path_factory) -> Found:
    """The runs of all experiments with three seeds, in which less reaches the weights the better a strategy clips."""
    runs = tmp_path_factory.mktemp("all")
    places = expected(sets()["all"], runs)
    for (setting, seed), (place, cfg) in places.items():
        if not place.path.exists():
            bump = {"none": 0.8, "fixed": 0.3}.get(setting.clip, 0.05)
            bump = bump * (1 + seed / 10) if cfg.data.corruption.steps else 0.0
            loss = 5.0 + bump + cfg.clip.get("z_thresh", 0) / 100 + cfg.clip.get("alpha", 0) / 10
            write_run(place.path, cfg, seed, bump, train_loss=loss)
            score(place.path, "hellaswag", 100, acc=0.1, acc_norm=cfg.lr + seed / 100, acc_norm_stderr=0.04)
            score(place.path, "winogrande", 100, acc=0.5 + 0.1 * cfg.clip.get("alpha", 0), acc_stderr=0.05)
    return collect({key: place for key, (place, _) in places.items()}, identity)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")
