"""What make_tables.py, make_figures.py and make_report.py have in common: which runs they read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, ListConfig, OmegaConf

from common.errors import UserError
from experiments.paper.collect import Expected, Found, collect
from experiments.paper.distributions import UnfitWindow, distributions
from experiments.paper.drawing import NothingToDraw
from experiments.paper.figures import DRAWN, clipping_functions, draw
from experiments.paper.suites import TABLES, ZCLIP, sets
from training.config.checks import CONFIGS, check_folder, identity
from training.config.compose import locate
from zclip import ZClip
from zclip.arguments import is_count

#: What has a picture, and what there is in all, in the order of the report.
PICTURES = ("figure3", *DRAWN)
EVERYTHING = tuple(dict.fromkeys([*TABLES, *PICTURES]))

#: Variants of the clipping function by their names in the paper.
VARIANTS = {"max": "max", "mean": "mean", "reciprocal": "adaptive_scaling"}


def chosen(cfg: DictConfig, kind: Sequence[str] = EVERYTHING) -> list[str]:
    """Return which tables and figures are asked for, or raise `UserError` if anything makes no sense.

    Args:
        cfg: of configs/paper.
        kind: those that are made; the others that are asked for are passed over.
    """
    names = list(cfg.experiment) if isinstance(cfg.experiment, ListConfig) else [cfg.experiment]
    for name in names:
        if name not in ("all", *EVERYTHING):
            raise UserError(f"experiment={name} is not known here: it must be of {', '.join(EVERYTHING)}, or all")
    wanted = [name for name in kind if "all" in names or name in names]
    if not wanted:
        raise UserError(f"experiment={cfg.experiment} is not made here: it must be of {', '.join(kind)}, or all")
    if cfg.out is not None and not isinstance(cfg.out, str):
        raise UserError(f"out={cfg.out} is not allowed: it must be a folder, or null")
    scales = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml") if path.stem != "main")
    if cfg.scale not in scales:
        raise UserError(f"scale={cfg.scale} is not known: it must be one of {', '.join(scales)}")
    if not isinstance(cfg.seeds, ListConfig) or not cfg.seeds or not all(is_count(seed, 0) for seed in cfg.seeds):
        raise UserError(f"seeds={cfg.seeds} is not allowed: it must be a list of integers from 0, as [0,1,2]")
    if not isinstance(cfg.overrides, ListConfig) or not all(
        isinstance(each, str) and "=" in each for each in cfg.overrides
    ):
        raise UserError(
            f"overrides={cfg.overrides} is not allowed: it must be a list of settings in quotes, as "
            """'overrides=["trainer.max_steps=400"]'"""
        )
    own = {override.partition("=")[0] for setting in sets()["all"] for override in setting.overrides}
    for each in cfg.overrides:
        if (key := each.partition("=")[0].lstrip("+~")) in (*own, "lr", "seed", "scale", "experiment"):
            raise UserError(f"overrides={cfg.overrides} is not allowed: {key} is what the experiments set themselves")
    if not isinstance(cfg.paths.runs, str) or not Path(cfg.paths.runs).is_dir():
        raise UserError(f"paths.runs={cfg.paths.runs} is not there: it must be the folder with paper-{cfg.scale}/")
    return wanted


def gather(cfg: DictConfig) -> Found:
    """Return what there is of the runs of all experiments; raise `UserError` if none is finished."""
    settings = sets()["all"]
    base = ["experiment=paper", f"scale={cfg.scale}", f"paths.runs={_quoted(cfg.paths.runs)}", *cfg.overrides]
    places = locate([[*base, *setting.overrides] for setting in settings], cfg.seeds)
    expected = {
        (setting, seed): Expected(*places[(*base, *setting.overrides), seed])
        for setting in settings
        for seed in cfg.seeds
    }
    found = collect(expected, identity)
    if not found.runs:
        why = "".join(f"; {said}" for said in found.others[:3])
        raise UserError(
            f"paths.runs={cfg.paths.runs} has no finished run of scale={cfg.scale} with seeds={cfg.seeds}"
            f"{f' and overrides={cfg.overrides}' if cfg.overrides else ''}: nothing is written{why}"
        )
    return found


def _quoted(value: str) -> str:
    """Return a value as Hydra takes it whatever is in it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def out_folder(cfg: DictConfig, inside: str = "") -> Path:
    """Return the folder to write into, or one inside it, made if need be."""
    out = Path(cfg.paths.runs, f"results-{cfg.scale}") if cfg.out is None else Path(cfg.out)
    out = out / inside
    check_folder("out", str(out), out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def drawn(
    names: Sequence[str], found: Found | None, windows: list[tuple[int, int]] | None
) -> tuple[dict[str, Figure], list[str]]:
    """Return figures by name, and the names of those without runs.

    Args:
        names: of tables and figures; tables that have no figure are passed over.
        found: the runs; `None` for Figure 3 alone, which needs none.
        windows: of Figure 9.
    """
    figures: dict[str, Figure] = {}
    undrawn = []
    for name in (name for name in names if name not in TABLES or name in DRAWN):
        try:
            if name == "figure3":
                figures[name] = figure3()
                continue
            assert found is not None
            if name == "figure9":
                figures[name] = distributions(found, windows)
            else:
                figures[name] = draw(name, found)
        except UnfitWindow as error:
            raise UserError(str(error)) from error
        except NothingToDraw:
            undrawn.append(name)
    return figures, undrawn


def step_windows(cfg: DictConfig) -> list[tuple[int, int]] | None:
    """Return the windows of Figure 9, or raise `UserError`."""
    if cfg.windows is None:
        return None
    given = OmegaConf.to_container(cfg.windows) if OmegaConf.is_list(cfg.windows) else [cfg.windows]
    assert isinstance(given, list)
    if not given or any(
        not isinstance(pair, list) or len(pair) != 2 or not all(map(is_count, pair)) or pair[1] - pair[0] < 2
        for pair in given
    ):
        raise UserError(
            f"windows={cfg.windows} is not allowed: it must be pairs of the first and last of three steps or more, as "
            "[[500,635],[3050,3185]]"
        )
    return [(first, last) for first, last in given]


def figure3() -> Figure:
    """Draw what each variant of ZClip makes of norms with a mean of 1 and a standard deviation of 1."""
    curves = {}
    for name, option in VARIANTS.items():
        strategy = ZClip(clip_option=option, z_thresh=ZCLIP["z_thresh"], recovery_window=None)
        state = strategy.initial_state(torch.zeros((), dtype=torch.float64))
        state |= {"count": torch.tensor(strategy.warmup_steps), "mean": torch.ones_like(state["mean"])}
        state["var"] = torch.ones_like(state["var"])
        z = np.linspace(0, 10, 401)
        norms = torch.from_numpy(1 + z)
        kept = [float(norm.minimum(strategy.decide(norm, dict(state)).target)) - 1 for norm in norms]
        curves[f"{name}, z_thresh {ZCLIP['z_thresh']:g}"] = (z, np.array(kept))
    return clipping_functions(curves)
