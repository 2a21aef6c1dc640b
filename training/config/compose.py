"""From Hydra's container to `Config`: inside the packages, nobody else sees the container."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigError, UserError, one_line, prefix_errors
from common.reading import MOST_YAML, damage, parse_yaml, read_bytes
from common.settings import Values, parse
from common.text import flatten, overrides_dict
from models import LlamaConfig
from models.config import ModelConfig
from models.hugging_face import config_of
from training.config.identity import changes_result, differences, identity, is_place, run_name, run_path
from training.config.live import SECTIONS, is_live
from training.config.schema import Config
from training.config.strategy import is_ours

CONFIGS = Path(__file__).parents[2] / "configs"


def _hugging_face(folder: object, field: str, *, _root_: DictConfig) -> Any:
    """Return a field of the shape of the model in a folder, as configs/model/hf.yaml takes it."""
    if folder is None:
        problem = "is not possible with model=hf: it must be a Hugging Face folder"
        raise ConfigError("model.init_from", None, problem=problem)
    runs, experiment, name = (OmegaConf.select(_root_, key) for key in ("paths.runs", "experiment", "name"))
    return getattr(_shape(str(folder), f"{runs}/{experiment}", None if name is None else str(name)), field)


@lru_cache
def _shape(folder: str, runs: str, name: str | None) -> LlamaConfig:
    """Return the shape of the model in a Hugging Face folder.

    If it cannot be read, its shape is that of the finished runs in `runs` that began with it, or of the one with this
    name, so that such a run can be shown. Without one, or if they differ, the error stays.
    """
    place = Path(os.path.expanduser(folder))  # noqa: PTH111 - as settings do
    try:
        with prefix_errors("model"):
            return config_of(place)
    except UserError:
        shapes = {model.llama for model in _finished_models(runs, name) if model.init_from == str(place)}
        if len(shapes) != 1:
            raise
        return shapes.pop()


def _finished_models(runs: str, name: str | None) -> Iterator[ModelConfig]:
    """Yield the section `model` of each finished run in a folder whose configuration can be read."""
    for result in Path(os.path.expanduser(runs)).glob("*/result.json"):  # noqa: PTH111
        if name in (None, result.parent.name):
            with suppress(UserError):
                yield read_config(result.with_name("config.yaml")).model


OmegaConf.register_new_resolver("hugging_face", _hugging_face, replace=True)
# Learning rates of the paper's experiments, in configs/experiment/paper.yaml.
OmegaConf.register_new_resolver("multiply", lambda value, factor: float(f"{value * factor:.6g}"), replace=True)
# The sequence length where a model's context may be shorter, in configs/scale/main.yaml.
OmegaConf.register_new_resolver("min", min, replace=True)


def container(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain nested dicts, without Hydra's own section.

    Raises omegaconf's errors for a key without a value, and for an interpolation that fails.
    """
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def load_config(cfg: DictConfig, overrides: Iterable[str] = (), resumed: Config | None = None) -> Config:
    """Return the typed configuration of a run, composed with these overrides of the command line.

    If it continues a run that has begun (`resumed`), its trainer has that run's settings, but for the overrides: the
    number of processes must fit the strategy of the run.

    Raises `UserError` if a key or value is not allowed.
    """
    plain, named = container(cfg), overrides_dict(overrides)
    if resumed is not None:
        given = {key: value for key, value in plain["trainer"].items() if f"trainer.{key}" in named}
        plain["trainer"] = resumed.trainer.model_dump(mode="json", by_alias=True) | given
    return parse(Config, Values(plain, named))


def read_config(path: Path) -> Config:
    """Return the configuration in a config.yaml; raise `UserError` if it is damaged, or of another version."""
    try:
        plain = parse_yaml(read_bytes(path, MOST_YAML))
        if not isinstance(plain, dict):
            raise ValueError("no mapping of settings")
        return parse(Config, plain)
    except UserError as error:
        raise UserError(
            f"{path} is not a configuration of this version ({one_line(error)}): a run of another version cannot "
            "be read or continued; choose another name"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(damage(path, error, "restore it, or choose another name")) from error


class _Dumper(yaml.SafeDumper):
    """Writes rare line breaks, such as U+0085, as escapes; PyYAML would write them so that they are read as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        rare_break = any(character in data for character in "\r\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if rare_break else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(config: Config) -> str:
    """Return a configuration as `read_config` reads it."""
    return yaml.dump(config.model_dump(mode="json", by_alias=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def resumed_config(composed: Config, saved: Config, overrides: Iterable[str]) -> Config:
    """Return the configuration of `resume=FOLDER`: the saved one, with overrides.

    Raises `ConfigError` if an override changes the result, and is no argument of the strategy or the rule over updates.
    """
    ours, plain = (config.model_dump(mode="json", by_alias=True) for config in (composed, saved))

    def refusal(key: str) -> ConfigError:
        problem = f"is not possible with resume={composed.resume}: the run has its own settings; leave it out"
        return ConfigError(key, flatten(ours).get(key, "..."), problem=problem)

    named = overrides_dict(overrides)
    targets = {section: getattr(saved, section).target for section in ("clip", "update", "optim")}
    for key, target in ((f"{section}._target_", target) for section, target in targets.items()):
        if not is_ours(target) and named.pop(key, None) != target:
            problem = (
                f"is not a class of zclip, and not imported because a file says so: add {key}={target} if you trust it"
            )
            raise ConfigError(key, target, problem=problem)
    for key in named:
        section, _, name = key.partition(".")
        if is_live(key) and name in ours[section]:
            plain[section][name] = ours[section][name]
        elif key in SECTIONS:
            if named[key].startswith("{"):
                problem = f"is not possible with resume={composed.resume}: change arguments as {key}.KEY=VALUE"
                raise ConfigError(key, named[key], problem=problem)
            other, kept = getattr(composed, key), getattr(saved, key)
            if (other.target, other.name) != (kept.target, kept.name):
                arguments = f", of which arguments may change, as {key}.KEY=VALUE" if kept.arguments else ""
                problem = (
                    f"is not possible with resume={composed.resume}: the run keeps its {SECTIONS[key]}, "
                    f"{kept.name}{arguments}; fork_from= takes another one"
                )
                raise ConfigError(key, other.name, problem=problem)
        elif is_place(key):
            _move(plain["data"], ours["data"], name)
        elif changes_result(key) or key in ("name", "experiment"):
            raise refusal(key)
        elif section == "trainer":
            plain["trainer"][name] = ours["trainer"][name]
        elif key != "resume":
            plain[section] = ours[section]
    resumed = parse(Config, plain)
    changed = [key for key in differences(resumed, saved, is_named=False) if not is_live(key)]
    if changed:  # keys of checkpoints, to which the run is rewound
        raise refusal(changed[0])
    return resumed


def _move(saved: dict[str, Any], given: Mapping[str, Any], name: str) -> None:
    """Take the place of a text or tokenizer from other settings of the section `data`, by its dotted name there."""
    if name.startswith("sources."):
        source = name.split(".")[1]
        if saved["sources"].get(source) is None or given["sources"].get(source) is None:
            raise ConfigError(f"data.{name}", None, problem=f"is not possible: the run has no source {source}")
        saved["sources"][source]["path"] = given["sources"][source]["path"]
        return
    before, saved[name] = saved[name], given[name]
    if name != "path":
        return
    if before is None:
        raise ConfigError("data.path", given[name], problem="is not possible: the run's text was not at a path")
    for source in saved["sources"].values():
        if source is not None and source["path"] == before:
            source["path"] = given[name]


def fork_settings(base: Config, times: int) -> dict[str, Any]:
    """Return the settings, by dotted key, of a run that begins after the last step of the run `base` next to it.

    Its length is `times` that of the other.
    """
    steps = base.trainer.max_steps
    return {"fork_from": f"{run_name(base)}@{steps}", "trainer.max_steps": times * steps}


def resolve_runs(
    runs: Mapping[Any, tuple[tuple[str, ...], tuple[tuple[str, ...], int] | None]], seeds: Iterable[int]
) -> dict[tuple[Any, int], tuple[Path, Mapping[str, Any]]]:
    """Return the folder and the identity of each run, by its key and each of the seeds.

    `runs` are the overrides of each run; and of one that begins after another, the overrides of that other and the
    length in multiples of its own, see `fork_settings`.
    """
    resolved: dict[tuple[Any, int], tuple[Path, Mapping[str, Any]]] = {}
    GlobalHydra.instance().clear()  # the calling script itself has been composed
    with initialize_config_dir(str(CONFIGS.absolute()), version_base="1.3"):
        composed = lru_cache(maxsize=None)(lambda overrides: container(compose("train", list(overrides))))
        for key, (overrides, fork) in runs.items():
            for seed in seeds:
                plain = composed(overrides) | {"seed": seed}
                if fork is not None:
                    settings = fork_settings(parse(Config, composed(fork[0]) | {"seed": seed}), fork[1])
                    trainer = plain["trainer"] | {"max_steps": settings["trainer.max_steps"]}
                    plain |= {"fork_from": settings["fork_from"], "trainer": trainer}
                config = parse(Config, plain)
                resolved[key, seed] = run_path(config), identity(config)
    return resolved


def saved_identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run by the content of its config.yaml, see `training.config.identity.identity`."""
    return identity(parse(Config, plain), is_named=False)
