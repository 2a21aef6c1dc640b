"""What make_tables.py, make_figures.py and make_report.py share: their settings, and the runs that they read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator

from common.errors import ConfigError, UserError
from common.settings import Allowed, Count, PathText, Settings
from common.text import overrides_dict, quoted
from experiments.paper.distributions import draw_distributions
from experiments.paper.drawing import NothingToDraw
from experiments.paper.figures import FIGURES, clipping_functions
from experiments.paper.tables_and_figures import SUITES, TABLES, ZCLIP_DEFAULTS
from experiments.run.collect import RunCollection
from scripts._declared import Overrides, Seeds, collect_declared
from training.config.checks import check_folder
from training.config.compose import CONFIGS
from zclip import ZClip

#: Names that have a figure, and all names, in the order of the report.
FIGURE_NAMES = ("figure3", *FIGURES)
ALL_NAMES = tuple(dict.fromkeys([*TABLES, *FIGURE_NAMES]))

#: Scales at which runs can be made.
SCALES = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml") if path.stem != "main")

Window = Annotated[list[Count], Field(min_length=2, max_length=2)]
WINDOWS = "pairs of the first and last of three steps or more, as [[500,635],[3050,3185]]"


class RunsPath(Settings):
    """Where the runs are."""

    runs: Annotated[PathText, Allowed("the folder with the runs of a scale")]
    """Folder with `paper-<scale>/`."""


class PaperSettings(Settings):
    """Settings of the scripts (configs/paper/results.yaml)."""

    scale: Annotated[str, Allowed(f"one of {', '.join(SCALES)}")]
    """Scale of the runs."""
    experiment: Annotated[str | list[str], Allowed(f"of {', '.join(ALL_NAMES)}, or all")]
    """Tables and figures to make: one name, or a list."""
    seeds: Seeds
    """Seeds of the runs."""
    overrides: Overrides
    """Further settings that the runs were made with."""
    windows: Annotated[list[Window] | None, Allowed(WINDOWS)]
    """First and last steps of Figure 9's windows; null: at the same fractions of the run as in the paper."""
    out: Annotated[PathText | None, Allowed("a folder, or null")]
    """Folder to write into; null: `results-<scale>` in `paths.runs`."""
    paths: RunsPath

    @property
    def names(self) -> list[str]:
        """The names of `experiment`."""
        return [self.experiment] if isinstance(self.experiment, str) else self.experiment

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.names:
            if name not in ("all", *ALL_NAMES):
                problem = f"is not known here: it must be of {', '.join(ALL_NAMES)}, or all"
                raise ConfigError("experiment", name, problem=problem)
        if self.scale not in SCALES:
            raise ConfigError("scale", self.scale, problem=f"is not known: it must be one of {', '.join(SCALES)}")
        for key in overrides_dict(self.overrides):
            if key in (*_varied(), "seed", "scale", "experiment"):
                problem = f"is not allowed: {key} is what the experiments set themselves"
                raise ConfigError("overrides", self.overrides, problem=problem)
        if self.windows is not None and (not self.windows or any(last - first < 2 for first, last in self.windows)):
            raise ConfigError("windows", self.windows, WINDOWS)
        if not Path(self.paths.runs).is_dir():
            problem = f"is not there: it must be the folder with paper-{self.scale}/"
            raise ConfigError("paths.runs", self.paths.runs, problem=problem)
        return self

    def selected(self, available: Sequence[str] = ALL_NAMES) -> list[str]:
        """Return the names to make, of those that the script makes; raise `UserError` if there are none."""
        if names := [name for name in available if "all" in self.names or name in self.names]:
            return names
        raise UserError(f"experiment={self.experiment} is not made here: it must be of {', '.join(available)}, or all")

    def out_folder(self, subfolder: str = "") -> Path:
        """Return the folder to write into, or a subfolder of it. Creates it."""
        out = Path(f"{self.paths.runs}/results-{self.scale}" if self.out is None else self.out, subfolder)
        check_folder("out", str(out), out)
        out.mkdir(parents=True, exist_ok=True)
        return out


def _varied() -> list[str]:
    """Return the settings in which the runs of the experiments differ, except for their seeds."""
    return [*overrides_dict(override for spec in SUITES["all"] for override in spec.overrides), "lr"]


def collect_runs(settings: PaperSettings, names: Sequence[str]) -> RunCollection:
    """Return the runs of these tables and figures that exist; raise `UserError` if none is finished."""
    runs = settings.paths.runs
    base = ["experiment=paper", f"scale={settings.scale}", f"paths.runs={quoted(runs)}", *settings.overrides]
    problem = (
        f"paths.runs={runs} has no finished run of scale={settings.scale} with seeds={settings.seeds}"
        f"{f' and overrides={settings.overrides}' if settings.overrides else ''}"
    )
    specs = dict.fromkeys(spec for name in names for spec in SUITES.get(name, ()))
    is_all = specs.keys() == {*SUITES["all"]}
    return collect_declared(specs, base, settings.seeds, problem, () if is_all else _varied())


def draw_figures(
    names: Sequence[str], collection: RunCollection | None, windows: Sequence[Sequence[int]] | None
) -> tuple[dict[str, Figure], list[str]]:
    """Return figures by name, and the names of those without runs. Of `names`, tables without a figure are ignored.

    Figure 3 needs no runs. `windows` are those of Figure 9.
    """
    figures: dict[str, Figure] = {}
    not_drawn = []
    for name in (name for name in names if name in FIGURE_NAMES):
        if collection is None or name == "figure3":
            figures[name] = figure3()
            continue
        try:
            if name == "figure9" and windows:
                figures[name] = draw_distributions(collection, [(first, last) for first, last in windows])
            else:
                figures[name] = FIGURES[name](collection)
        except NothingToDraw:
            not_drawn.append(name)
    return figures, not_drawn


def figure3() -> Figure:
    """Draw Figure 3: norms with mean 1 and standard deviation 1, clipped by each variant of ZClip."""
    curves = {}
    z = np.linspace(0, 10, 401)
    norms = torch.from_numpy(1 + z)
    for name, option in {"max": "max", "mean": "mean", "reciprocal": "adaptive_scaling"}.items():
        strategy = ZClip(clip_option=option, z_thresh=ZCLIP_DEFAULTS["z_thresh"], recovery_window=None)
        state = strategy.initial_state(torch.zeros((), dtype=torch.float64))
        one = torch.ones_like(state["mean"])
        state |= {"count": torch.tensor(strategy.warmup_steps), "mean": one, "var": one}
        clipped = [float(norm.minimum(strategy.decide(norm, dict(state)).target)) - 1 for norm in norms]
        curves[f"{name}, z_thresh {ZCLIP_DEFAULTS['z_thresh']:g}"] = (z, np.array(clipped))
    return clipping_functions(curves)
