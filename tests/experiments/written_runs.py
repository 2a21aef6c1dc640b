"""Runs as training would leave them: their expected folders, their contents, and their files."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from common.settings import parse
from common.text import quoted
from experiments.labs.declaration import Arm, SpikeLab
from experiments.paper.tables_and_figures import RunSpec
from experiments.run.collect import ExpectedRun, Key, RunCollection
from experiments.run.read import Run
from tests.helpers import CHECKOUT, RESULT
from training.config.compose import container, to_yaml
from training.config.identity import identity, run_path
from training.config.schema import Config

CORRUPTED_STEPS = [80, 100, 120]
SMALL = ("trainer.max_steps=140", f"paper.corruption_steps={CORRUPTED_STEPS}", f"paper.lab_steps={CORRUPTED_STEPS}")
SEEDS = (0, 1, 2)
#: Overrides of the scripts that read runs; other folders are set afterwards, so that no run is composed twice.
BASE = ("experiment=paper", "scale=micro", f"paths.runs={quoted('runs')}")
#: The environment of each run.
START = {"commit": "0123456789abcdef", "uncommitted_changes": False, "versions": {"torch": "2"}, "device": "a CPU"}


#: Configurations of train.py that are composed already, by their overrides.
COMPOSITIONS: dict[tuple[str, ...], DictConfig] = {}


def composed(*overrides: str) -> DictConfig:
    """Return the configuration of train.py, composed once in a session; Hydra takes a tenth of a second for each."""
    if overrides not in COMPOSITIONS:
        with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
            COMPOSITIONS[overrides] = compose("train", list(overrides))
    return COMPOSITIONS[overrides]


def expected_runs(
    specs: Iterable[RunSpec], runs: Path, seeds: Iterable[int] = SEEDS, settings: Iterable[str] = SMALL
) -> dict[Key, tuple[ExpectedRun, Config]]:
    """Return each expected run with its configuration, by spec and seed."""
    expected = {}
    for spec in dict.fromkeys(specs):
        plain = container(composed(*BASE, *settings, *spec.overrides))
        for seed in seeds:
            config = parse(Config, plain | {"seed": seed, "paths": plain["paths"] | {"runs": str(runs)}})
            expected[spec, seed] = ExpectedRun(run_path(config), identity(config)), config
    return expected


def places(
    expected: Mapping[Key, tuple[ExpectedRun, Config]],
) -> dict[Key, ExpectedRun]:
    """Return the expected runs without their configurations, as `collect` takes them."""
    return {key: place for key, (place, _) in expected.items()}


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with other settings, by dotted key."""
    plain = config.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = plain
        for part in sections:
            section = section[part]
        section[name] = value
    return parse(Config, plain)


def score(task: str, items: int, **metrics: float) -> dict[str, Any]:
    """Return a zero-shot score of a finished run."""
    return {"task": task, "num_fewshot": 0, "step": 140, "items": items, **metrics}


def run_of(
    path: Path, config: Config, seed: int, bump: float = 0.0, scores: Iterable[Mapping[str, Any]] = (), **result: Any
) -> Run:
    """Return a finished run whose loss falls from 6 to 5, plus `bump` for five steps after corrupted batches."""
    rng = np.random.default_rng(seed)
    steps = config.trainer.max_steps
    loss = np.linspace(6, 5, steps) + rng.normal(0, 0.02, steps)
    norm = rng.normal(0.36, 0.02, steps)
    for step in sorted(set(config.data.corruption.steps)):
        loss[step - 1], norm[step - 1] = 9.0, 5.0
        loss[step : step + 5] += bump
    row = np.arange(steps)
    spike_period = int(20 * config.clip.arguments.get("z_thresh", 100))
    metrics = {
        "step": row + 1.0, "tokens": 2048.0 * (row + 1), "loss": loss, "grad_norm": norm, "clipped": 1.0 * (row < 14),
        "clipped_norm": np.minimum(norm, 1.0), "tokens_per_second": np.full(steps, 1e4), "z": np.zeros(steps),
        "mean": np.full(steps, 0.4), "std": np.full(steps, 0.1), "spike": 1.0 * (row % spike_period == 1),
    }  # fmt: skip
    numbers = {
        "steps": steps, "tokens": 2048 * steps, "train_loss": 5.0 + bump, "test_loss": 4.9 + bump + seed / 100,
        "test_bits_per_byte": 2.4 + bump / 4, "parameters": 640_000, "data_fingerprint": "abcd",
        "clipped_share": 0.1, "clipped_by_z": 7,
        "tokens_per_second": 1e4, "step_seconds": {"data": 0.0, "forward_backward": 0.98, "clip": 0.02},
        "unigram_entropy": 6.5, "test_tokens": 1000, "spikes": 3, "spike_definition": "ours",
    }  # fmt: skip
    plain = config.model_dump(mode="json", by_alias=True)
    return Run(path, plain, metrics, numbers | result, [], [START], [dict(each) for each in scores])


def write_run(path: Path, config: Config, seed: int, bump: float = 0.0, done: bool = True, **more: Any) -> None:
    """Write the files of `run_of`, without result.json if the run is not `done`."""
    run = run_of(path, config, seed, bump, **more)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    counts = {name: run.metrics[name].astype(int) for name in ("step", "tokens")}
    rows = zip(*(column.tolist() for column in (run.metrics | counts).values()), strict=True)
    lines = (json.dumps(dict(zip(run.metrics, row, strict=True))) for row in rows)
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (path / "environment.json").write_text(json.dumps({"starts": run.starts}))
    if run.scores:
        (path / "task_scores.json").write_text(json.dumps({"scores": run.scores}))
    if done:
        (path / "result.json").write_text(json.dumps(run.result))


def modify(
    collection: RunCollection, change: Callable[[RunSpec, int, Run], Run], diverged: Iterable[Key] = ()
) -> RunCollection:
    """Return the runs as returned by `change(spec, seed, run)`."""
    runs = {key: change(*key, run) for key, run in collection.runs.items()}
    return collection._replace(runs=runs, diverged=set(diverged))


def without(collection: RunCollection, *keys: Key) -> RunCollection:
    """Return the collection without some runs."""
    return collection._replace(runs={key: run for key, run in collection.runs.items() if key not in keys})


def write_lab_run(runs: Path, lab: SpikeLab, arm: Arm, seed: int, loss: np.ndarray, norm: np.ndarray) -> None:
    """Write a finished run of a lab with these losses and norms, (steps,) arrays."""
    plain = container(composed(f"experiment={lab.name}", *arm.overrides))
    config = parse(Config, plain | {"seed": seed, "paths": plain["paths"] | {"runs": str(runs)}})
    path = run_path(config)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    columns = {"loss": loss, "grad_norm": norm, "clipped_norm": norm, "clipped": 0 * norm}
    if config.clip.target == "zclip.ZClip":
        columns |= {"mean": norm, "std": norm, "spike": 0 * norm}
    if config.update.target is not None:
        columns |= {"update_norm": 10 * norm, "update_scale": 0 * norm + 0.5, "update_bound": 20 * norm}
    rows = [
        {"step": i + 1, "tokens": 1024 * (i + 1), **{name: float(values[i]) for name, values in columns.items()}}
        for i in range(len(loss))
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row).replace("NaN", "null") + "\n" for row in rows))
    (path / "environment.json").write_text(json.dumps({"starts": [START]}))
    (path / "result.json").write_text(json.dumps(RESULT | {"steps": len(loss)}))
