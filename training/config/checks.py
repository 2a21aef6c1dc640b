"""Everything that can be wrong with a configuration, found before any work starts.

`check` raises `UserError` with one sentence that names the key, the value and what is allowed. The other
rooms raise `ValueError("field=value ...")` for their own settings; `section` puts the group in front.
`identity` says which settings make a run what it is: the run folder's default name carries their hash.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack, get_args, get_origin

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from common.errors import ConfigError, UserError
from common.settings import parse
from data import Corpus, sources_of
from models import LlamaConfig
from models.hugging_face import check_weights, config_of
from training.config.parallelism import shards, world_size
from training.config.rules import RULES, STRATEGIES, WANDB_RULES, Rule
from training.runtime.memory import available_memory
from zclip import ClippingStrategy

CONFIGS = Path(__file__).parents[2] / "configs"

#: Settings that change what is written or shown, but not what is computed.
NOT_IDENTITY = ("name", "experiment", "paths", "logger", "plan", "hardware", "print_run_dir", "eval", "paper")
NOT_IDENTITY_TRAINER = (
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "async_save",
    "val_every",
    "val_tokens",
    "eval_every",
    "nodes",
    "devices",
)


def check(cfg: DictConfig) -> None:
    """Raise `UserError` if anything in the configuration stands against running it, or planning it. Writes nothing.

    Only whether the text has enough tokens, not just enough bytes, is left for when it is tokenized.
    """
    rules = RULES | (WANDB_RULES if OmegaConf.select(cfg, "logger.name") == "wandb" else {})
    check_rules(cfg, rules)
    for key in _leaves(cfg):
        if key not in rules and not key.startswith(("model.", "clip.", "data.sources.")):
            raise UserError(f"{key}={OmegaConf.select(cfg, key)} means nothing: there is no such key")
    if cfg.paper.suite is not None:
        raise UserError(
            f"experiment={cfg.paper.suite} is a set of runs: it needs -m; several are a list, as [table2,table3]"
        )
    clipping_strategy(cfg)
    model_config(cfg)
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available() and not cfg.plan:
        raise UserError(
            "trainer.accelerator=gpu is not possible: torch sees no GPU here; use trainer=cpu, "
            "for several processes with trainer.strategy and trainer.devices"
        )
    trainer = cfg.trainer
    if trainer.keep_every is not None and trainer.keep_every % trainer.checkpoint_every:
        raise UserError(
            f"trainer.keep_every={trainer.keep_every} is not allowed: it must be a multiple of "
            f"trainer.checkpoint_every={trainer.checkpoint_every}, or null"
        )
    _check_processes(cfg)
    if cfg.plan:  # for another machine, and without its data
        _check_steps(cfg)
        return
    _check_model(cfg)
    _check_initial_weights(cfg)
    corpus = check_data(cfg, cfg.data.sequence_length)
    with section("data"):
        if (ids := corpus.vocabulary()) > cfg.model.vocab_size:
            which = f"vocab_size={corpus.vocab_size}" if corpus.tokenizer is None else f"tokenizer={corpus.tokenizer}"
            raise ValueError(
                f"{which} is larger than the model's vocabulary: it has {ids:,} ids, and must have at "
                f"most model.vocab_size={cfg.model.vocab_size}"
            )
    _check_steps(cfg)
    if cfg.logger.name == "wandb":
        _check_wandb()
    if not (run_path(cfg) / "result.json").exists():
        check_folder("paths.runs", cfg.paths.runs, run_path(cfg))
    check_folder("paths.cache", cfg.paths.cache, Path(cfg.paths.cache))


def _check_steps(cfg: DictConfig) -> None:
    """Raise `UserError` if a bad batch is after the last step, or a sequence longer than the model's context."""
    late = [step for step in cfg.data.corruption.steps if step > cfg.trainer.max_steps]
    if late:
        raise UserError(
            f"data.corruption.steps={list(cfg.data.corruption.steps)} is not allowed: step {late[0]} is after the "
            f"last, trainer.max_steps={cfg.trainer.max_steps}"
        )
    if cfg.data.sequence_length > cfg.model.max_position_embeddings:
        raise UserError(
            f"data.sequence_length={cfg.data.sequence_length} is longer than the model's context: it must be at most "
            f"model.max_position_embeddings={cfg.model.max_position_embeddings}"
        )


def check_data(cfg: DictConfig, sequence_length: int) -> Corpus:
    """Return the corpus of `cfg.data`, or raise `UserError`. Writes nothing, and reads the first documents only."""
    check_rules(cfg, {key: rule for key, rule in RULES.items() if key.startswith("data.")})
    with section("data"):
        corpus = corpus_of(cfg)
        corpus.check(Path(cfg.paths.cache), sequence_length)
    return corpus


def check_folder(key: str, value: str, folder: Path) -> None:
    """Raise `UserError` unless files can be made in a folder, or in the nearest one above it that exists."""
    try:
        _try_writing(folder)
    except OSError as error:
        raise UserError(
            f"{key}={value} cannot be written ({error.strerror} at {folder}): "
            "it must be a folder in which files can be made"
        ) from error


def check_rules(cfg: DictConfig, rules: dict[str, Rule]) -> None:
    """Raise `UserError` if a value is not what its rule allows."""
    for key, (allowed, description) in rules.items():
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if not allowed(value):
            raise UserError(f"{key}={'null' if value is None else value} is not allowed: it must be {description}")


def corpus_of(cfg: DictConfig) -> Corpus:
    """Return what `cfg.data` says that tokens are made from.

    Raises:
        ValueError: a source has a setting that is unknown or not allowed.
    """
    data = cfg.data
    sources = sources_of(OmegaConf.to_container(data.sources, resolve=True))  # type: ignore[arg-type]
    if data.path is not None and data.path not in [source.path for source in sources]:
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"path={data.path} means nothing to the sources {names}: set sources.NAME.path, and hub=null")
    return Corpus(
        sources=tuple(sources),
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        val_fraction=data.val_fraction,
        deduplicate=data.deduplicate,
        max_tokens=None if data.max_tokens is None else int(data.max_tokens),
        streamed=data.mode == "stream",
    )


def _leaves(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, cfg):
        key = f"{prefix}{name}"
        inner = OmegaConf.select(cfg, name, throw_on_missing=False)
        if isinstance(inner, DictConfig):
            yield from _leaves(inner, f"{key}.")
        else:
            yield key


def _check_processes(cfg: DictConfig) -> None:
    """Raise `UserError` unless there can be such processes, and a global batch can be dealt out to them."""
    trainer = cfg.trainer
    processes = world_size(cfg)
    if trainer.strategy == "single" and processes > 1:
        raise UserError(
            f"trainer.strategy=single is not possible with trainer.nodes={trainer.nodes} and trainer.devices="
            f"{trainer.devices}: it must be one of {', '.join(STRATEGIES[1:])}"
        )
    if trainer.dp_replicate > 1 and trainer.strategy != "hsdp":
        raise UserError(
            f"trainer.dp_replicate={trainer.dp_replicate} is not possible with trainer.strategy={trainer.strategy}"
        )
    if trainer.dp_replicate == 1 and trainer.strategy == "hsdp":
        raise UserError(
            "trainer.dp_replicate=1 is not possible with trainer.strategy=hsdp: it must be from 2; fsdp has one replica"
        )
    if processes % trainer.dp_replicate:
        raise UserError(
            f"trainer.dp_replicate={trainer.dp_replicate} is not allowed: it must divide the {processes} processes"
        )
    if (started := os.environ.get("WORLD_SIZE", str(processes))) != str(processes):
        raise UserError(
            f"trainer.nodes={trainer.nodes} and trainer.devices={trainer.devices} are {processes} processes, but "
            f"{started} were started"
        )
    here = torch.cuda.device_count()
    if trainer.accelerator == "gpu" and here < trainer.devices and not cfg.plan:
        raise UserError(f"trainer.devices={trainer.devices} is not possible: torch sees {here} GPUs here")
    at_once = processes * trainer.micro_batch_size
    if trainer.global_batch_size % at_once:
        raise UserError(
            f"trainer.micro_batch_size={trainer.micro_batch_size} is not allowed: {processes} "
            f"process{'es' * (processes > 1)} x {trainer.micro_batch_size} = {at_once} sequences at once must divide "
            f"trainer.global_batch_size={trainer.global_batch_size}"
        )


def _check_model(cfg: DictConfig) -> None:
    """Raise `UserError` unless weights, gradients and two moments in fp32 fit the machine or each GPU."""
    config, trainer = model_config(cfg), cfg.trainer
    here = available_memory(cfg)
    needed = 16 * config.parameters // shards(cfg)
    if needed > here:
        where = "GPU" if trainer.accelerator == "gpu" else "process"
        raise UserError(
            f"model.name={cfg.model.name} has {config.parameters:,} parameters, which take {needed / 2**30:,.0f} GiB "
            f"to train: it must fit the {here / 2**30:,.0f} GiB of each {where}"
        )


def _check_wandb() -> None:
    """Raise `UserError` if wandb would stop to ask who you are."""
    if os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False):
            raise UserError(
                "logger=wandb needs to know who you are: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
            )


@contextmanager
def section(name: str) -> Iterator[None]:
    """Turn a `ValueError` about `field=value` into a `UserError` about `name.field=value`."""
    try:
        yield
    except ConfigError as error:
        raise error.within(name) from error
    except UserError:
        raise
    except ValueError as error:
        message = str(error)
        prefix = f"{name}." if re.match(r"[\w.-]+=", message) else f"{name}: "
        raise UserError(prefix + message) from error


def settings_of(group: DictConfig) -> dict[str, Any]:
    """Return a group's settings as a plain dict, without its `name`."""
    plain = OmegaConf.to_container(group, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "name"}


def model_config(cfg: DictConfig) -> LlamaConfig:
    """Return the model's shape, or raise `UserError`."""
    settings = settings_of(cfg.model)
    settings.pop("init_from", None)
    return parse(LlamaConfig, settings, "model")


@lru_cache
def _shape(folder: str | None) -> LlamaConfig:
    if folder is None:
        raise UserError("model.init_from=null is not possible with model=hf: it must be a Hugging Face folder")
    with section("model"):
        return config_of(Path(folder))


# What configs/model/hf.yaml is made of.
OmegaConf.register_new_resolver("hugging_face", lambda folder, field: getattr(_shape(folder), field), replace=True)


# Learning rates of configs/experiment/paper.yaml.
OmegaConf.register_new_resolver("multiply", lambda value, factor: float(f"{value * factor:.6g}"), replace=True)

# TokenDataset of configs/scale/main.yaml, where a model's context may be shorter.
OmegaConf.register_new_resolver("min", min, replace=True)


def _check_initial_weights(cfg: DictConfig) -> None:
    """Raise `UserError` unless the weights to start from fit the model, and come with their tokenizer."""
    if cfg.model.init_from is None:
        return
    folder, config = Path(cfg.model.init_from), model_config(cfg)
    with section("model"):
        theirs = vars(config_of(folder))
        for name, value in vars(config).items():
            if value != theirs[name] and name not in ("max_position_embeddings", "initializer_range"):
                raise ValueError(
                    f"{name}={value} is not allowed: {folder} has {theirs[name]}; model=hf takes its shape"
                )
        check_weights(folder, config)
    if cfg.data.tokenizer is None:
        raise UserError(
            f"data.tokenizer=null is not possible with model.init_from={folder}: it must be the tokenizer that the "
            f"weights were trained with, such as data.tokenizer={folder}"
        )


def clipping_strategy(cfg: DictConfig) -> ClippingStrategy:
    """Make the clipping strategy of `cfg.clip`, any class that its `_target_` names, or raise `UserError`."""
    settings = settings_of(cfg.clip)
    target = settings.pop("_target_", None)
    module, _, name = str(target).rpartition(".")
    try:
        made_by = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"clip._target_={target} cannot be imported ({error}): it must be module.Class") from error
    if not isinstance(made_by, type) or not issubclass(made_by, ClippingStrategy):
        raise UserError(f"clip._target_={target} is not allowed: it must be a subclass of zclip.ClippingStrategy")
    _check_names("clip", settings, made_by)
    with section("clip"):
        return made_by(**settings)


def _check_names(group: str, settings: dict[str, Any], made: type) -> None:
    parameters = list(inspect.signature(made.__init__).parameters.values())[1:]  # type: ignore[misc]
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for keywords in (p for p in parameters if p.kind is p.VAR_KEYWORD):
        if get_origin(keywords.annotation) is not Unpack:
            return  # it takes any name
        known += get_args(keywords.annotation)[0].__annotations__
    for name in settings.keys() - set(known):
        raise UserError(f"{group}.{name}={settings[name]} means nothing to {made.__name__}: it has {', '.join(known)}")
    required = [p.name for p in parameters if p.name in known and p.default is p.empty]
    for name in [name for name in required if name not in settings]:
        raise UserError(f"{group}.{name} is missing: {made.__name__} needs it")


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings on which the run's numbers depend, as a plain nested dict."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in NOT_IDENTITY}
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in NOT_IDENTITY_TRAINER}
    if kept["trainer"].get("on_nonfinite") == "rewind":  # it goes back to the last checkpoint
        kept["trainer"]["checkpoint_every"] = plain["trainer"]["checkpoint_every"]
    return kept


def fewshot_list(given: DictConfig) -> list[int]:
    """Return the numbers of solved examples that `cfg.eval` asks for."""
    return list(given.num_fewshot) if isinstance(given.num_fewshot, ListConfig) else [given.num_fewshot]


def run_name(cfg: DictConfig) -> str:
    """Return the name of the run folder: `cfg.name`, or one that settings alone determine."""
    if cfg.name is not None:
        return cfg.name
    digest = hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:8]
    return f"{cfg.model.name}-{cfg.clip.name}-lr{cfg.lr:g}-seed{cfg.seed}-{digest}"


def run_path(cfg: DictConfig) -> Path:
    """Return the run folder."""
    return Path(cfg.paths.runs) / cfg.experiment / run_name(cfg)


def _try_writing(folder: Path) -> None:
    """Raise `OSError` unless files can be made in `folder`, or in the nearest folder above it that exists."""
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass
