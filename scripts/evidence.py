"""What make_tables.py, make_figures.py and make_report.py have in common: which runs they read."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from experiments.catalogue import Setting, sets
from experiments.collection import Expected, Found, collect
from training.config import CONFIGS, ConfigError, check_folder, identity
from training.located import locate


def chosen(cfg: DictConfig) -> dict[str, list[Setting]]:
    """Return the experiments that are asked for, with their runs, or raise `ConfigError` if anything makes no sense."""
    known = sets()
    names = list(cfg.experiment) if isinstance(cfg.experiment, ListConfig) else [cfg.experiment]
    for name in names:
        if name not in known:
            raise ConfigError(f"experiment={name} is not known: it must be of {', '.join(known)}")
    scales = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml"))
    if cfg.scale not in scales:
        raise ConfigError(f"scale={cfg.scale} is not known: it must be one of {', '.join(scales)}")
    if not isinstance(cfg.seeds, ListConfig) or not cfg.seeds or any(type(seed) is not int for seed in cfg.seeds):
        raise ConfigError(f"seeds={cfg.seeds} is not allowed: it must be a list of integers, as [0,1,2]")
    if not Path(cfg.paths.runs).is_dir():
        raise ConfigError(f"paths.runs={cfg.paths.runs} is not there: it must be the folder with evidence-{cfg.scale}/")
    return {name: settings for name, settings in known.items() if "all" in names or name in names}


def gather(cfg: DictConfig, wanted: Mapping[str, list[Setting]]) -> Found:
    """Return what there is of the runs of some experiments."""
    settings = list(dict.fromkeys(setting for some in wanted.values() for setting in some))
    base = ["experiment=evidence", f"scale={cfg.scale}", f"paths.runs={cfg.paths.runs}", *cfg.also]
    places = locate([[*base, *setting.overrides] for setting in settings], cfg.seeds)
    expected = {
        (setting, seed): Expected(*places[(*base, *setting.overrides), seed])
        for setting in settings
        for seed in cfg.seeds
    }
    return collect(expected, identity)


def out_folder(cfg: DictConfig) -> Path:
    """Return the folder to write into, made if need be."""
    out = Path("experiments/results", cfg.scale) if cfg.out is None else Path(cfg.out)
    check_folder("out", str(out), out)
    out.mkdir(parents=True, exist_ok=True)
    return out
