"""Where the runs of command lines are, and what makes them what they are; without making them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from training.config.checks import CONFIGS, identity, run_path


def locate(
    runs: Iterable[Sequence[str]], seeds: Iterable[int]
) -> dict[tuple[tuple[str, ...], int], tuple[Path, Mapping[str, Any]]]:
    """Return folder and identity of each run, by its overrides and seed.

    Args:
        runs: overrides of each.
        seeds: that each is run with.
    """
    found: dict[tuple[tuple[str, ...], int], tuple[Path, Mapping[str, Any]]] = {}
    GlobalHydra.instance().clear()  # of the script itself, which has been composed
    with initialize_config_dir(str(CONFIGS.absolute()), version_base="1.3"):
        for overrides in runs:
            cfg = compose("train", list(overrides))
            for seed in seeds:
                cfg.seed = seed
                found[tuple(overrides), seed] = run_path(cfg), identity(cfg)
    return found
