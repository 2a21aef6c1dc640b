"""What can be wrong with a configuration on this machine, found before any work starts."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from pydantic import ValidationError
from torch.optim import SGD, Adagrad

from common.errors import ConfigError, UserError, one_line, prefix_errors, shown
from data import Corpus, DataConfig, corpus_from
from evaluation.tasks import check_data_dir, check_names
from models.config import ModelConfig
from models.hugging_face import check_weights, config_of
from models.llama import Llama
from training.config.optimizer import check_optimizer, group_of, optimizer_class, state_bytes
from training.config.own_rules import check_own_rules
from training.config.schema import Config, TrainerConfig
from training.config.strategy import clipping_strategy, update_rule
from training.runtime.hardware import available_memory
from zclip.scope import GROUP, in_scope, patterns_of

#: Fields of the model that may differ from those of the weights that training starts from.
FREE_FIELDS = {"max_position_embeddings", "initializer_range", "embedding_initializer_range"}


def check(config: Config, run_folder: Path, *, elsewhere: bool = False) -> None:
    """Raise `UserError` if the run cannot be started here, or planned if `config.plan` is set. Writes nothing.

    Of a finished run, which is only shown, less is checked: not its data, nor this machine.

    Only the number of tokens is left for when the text is tokenized: here it is estimated by the text's bytes.
    A run that is started `elsewhere`, as a job on nodes of a cluster, needs no GPUs and no memory here.
    """
    check_optimizer(config.optim, update_rule(config.update), config.update.name)
    check_own_rules(config)
    _check_scope(config)
    _check_fused(config)
    _check_started_processes(config.trainer)
    if config.plan:  # it may be for another machine: devices, data and batch size are not checked
        return
    if (run_folder / "result.json").exists():  # a finished run is only shown, wherever its text and devices are
        return
    if not elsewhere:
        _check_gpus(config.trainer)
    check_batch(config.trainer)
    if not elsewhere:
        _check_memory(config)
    _check_initial_weights(config)
    corpus = check_data(config.data, config.paths.cache, config.data.sequence_length)
    _check_vocabulary(corpus, config.model)
    if config.logger.name == "wandb":
        _check_wandb()
    _check_tasks(config)
    check_folder("paths.runs", config.paths.runs, run_folder)
    check_cache(corpus, config.paths.cache)


def _check_fused(config: Config) -> None:
    """Raise `ConfigError` if fused SGD or Adagrad would get sharded parameters, which torch refuses."""
    made_by = optimizer_class(config.optim)
    if issubclass(made_by, SGD | Adagrad) and config.optim.fused and config.trainer.sharded:
        strategy = f"trainer.strategy={config.trainer.strategy}"
        name = made_by.__name__
        problem = f"is not possible with {strategy}: fused {name} takes no sharded parameters; optim.fused=false does"
        raise ConfigError("optim.fused", True, problem=problem)


def _check_scope(config: Config) -> None:
    """Raise `UserError` unless each pattern of the strategy's scope matches a parameter, or a group."""
    scope = clipping_strategy(config.clip).scope
    if scope is None:
        return
    with torch.device("meta"):
        parameters = Llama(config.model.llama).named_parameters()
        groups = {f"model.{name}": group_of(config.optim, name, p.ndim) for name, p in parameters}
    names = [*groups]
    value, others = shown(config.clip.arguments["scope"]), f"the model's parameters, which are {', '.join(names[:4])}"
    for pattern in patterns_of(scope):
        if not any(in_scope(name, pattern.removeprefix("!"), groups[name]) for name in names):
            known = f"{others}, ..."
            if pattern.removeprefix("!").startswith(GROUP):
                known = f"the optimizer's groups: {', '.join(sorted({*groups.values()}))}"
            raise ConfigError("clip.scope", value, problem=f"is not allowed: {pattern} matches none of {known}")
    if not any(in_scope(name, scope, groups[name]) for name in names):
        raise ConfigError("clip.scope", value, problem=f"has none of {others}, ...")


def _check_started_processes(trainer: TrainerConfig) -> None:
    """Raise `UserError` if a launcher such as torchrun has started another number of processes."""
    processes = trainer.world_size
    if (started := os.environ.get("WORLD_SIZE", str(processes))) != str(processes):
        raise UserError(
            f"trainer.nodes={trainer.nodes} and trainer.devices={trainer.devices} are {processes} processes, but "
            f"{started} were started"
        )


def _check_gpus(trainer: TrainerConfig) -> None:
    """Raise `UserError` unless each process on this machine can have a GPU, if it needs one."""
    if trainer.accelerator == "gpu":
        if not torch.cuda.is_available():
            raise UserError(
                "trainer.accelerator=gpu is not possible: torch sees no GPU here; use trainer=cpu, "
                "for several processes with trainer.strategy and trainer.devices"
            )
        if (visible := torch.cuda.device_count()) < trainer.devices:
            problem = f"is not possible: torch sees {visible} GPUs here"
            raise ConfigError("trainer.devices", trainer.devices, problem=problem)


def check_batch(trainer: TrainerConfig) -> None:
    """Raise `ConfigError` unless the processes can share the global batch."""
    processes, micro = trainer.world_size, trainer.micro_batch_size
    at_once = processes * micro
    if trainer.global_batch_size % at_once:
        problem = (
            f"is not allowed: {processes} process{'es' * (processes > 1)} x {micro} = {at_once} sequences at once must "
            f"divide trainer.global_batch_size={trainer.global_batch_size}"
        )
        raise ConfigError("trainer.micro_batch_size", micro, problem=problem)


def check_data(data: DataConfig, cache: str, sequence_length: int) -> Corpus:
    """Return the corpus of `data`; raise `UserError` if it cannot be read, or is too short for one sequence.

    Writes nothing, and reads the first documents only.
    """
    with prefix_errors("data"):
        corpus = corpus_from(data)
        corpus.check(Path(cache), sequence_length)
    return corpus


def check_folder(key: str, value: str, folder: Path) -> None:
    """Raise `ConfigError` unless files can be made in a folder, or in the nearest one above it that exists."""
    parent = folder
    try:
        while not parent.exists() and not parent.is_symlink():
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        problem = f"cannot be written ({error.strerror} at {folder}): it must be a folder in which files can be made"
        raise ConfigError(key, value, problem=problem) from error


def check_cache(corpus: Corpus, cache: str) -> None:
    """Raise `ConfigError` unless the tokens of a corpus are in the cache, or can be written there."""
    if corpus.find(Path(cache)) is None:
        check_folder("paths.cache", cache, Path(cache))


#: Weights and gradients, in float32.
BYTES_PER_PARAMETER = 8


def _check_memory(config: Config) -> None:
    """Raise `ConfigError` unless what is kept of each parameter fits the machine or each GPU."""
    trainer, parameters = config.trainer, config.model.parameters
    available = available_memory(trainer.accelerator, trainer.devices)
    optimizer = state_bytes(config.optim, config.model.llama)
    needed = (BYTES_PER_PARAMETER * parameters + optimizer) / trainer.dp_shard
    if needed > available:
        problem = (
            f"has {parameters:,} parameters, which take {needed / 2**30:,.0f} GiB to train: it must fit the "
            f"{available / 2**30:,.0f} GiB of each {'GPU' if trainer.accelerator == 'gpu' else 'process'}"
        )
        raise ConfigError("model.name", config.model.name, problem=problem)


def _check_initial_weights(config: Config) -> None:
    """Raise `ConfigError` unless the initial weights fit the model, and come with their tokenizer."""
    if config.model.init_from is None:
        return
    folder, shape = Path(config.model.init_from), config.model.llama
    with prefix_errors("model"):
        stored = config_of(folder).model_dump()
        for name, value in shape.model_dump().items():
            if value != stored[name] and name not in FREE_FIELDS:
                problem = f"is not allowed: {folder} has {stored[name]}; model=hf takes its shape"
                raise ConfigError(name, value, problem=problem)
        check_weights(folder, shape)
    if config.data.tokenizer is None:
        problem = (
            f"is not possible with model.init_from={folder}: it must be the tokenizer that the weights were trained "
            f"with, such as data.tokenizer={folder}"
        )
        raise ConfigError("data.tokenizer", None, problem=problem)


def _check_vocabulary(corpus: Corpus, model: ModelConfig) -> None:
    """Raise `ConfigError` if the tokenizer has more ids than the model."""
    with prefix_errors("data"):
        if (ids := corpus.vocabulary()) > model.vocab_size:
            problem = (
                f"is larger than the model's vocabulary: it has {ids:,} ids, and must have at most "
                f"model.vocab_size={model.vocab_size}"
            )
            own = corpus.tokenizer is None
            key, value = ("vocab_size", corpus.vocab_size) if own else ("tokenizer", corpus.tokenizer)
            raise ConfigError(key, value, problem=problem)


def _check_tasks(config: Config) -> None:
    """Raise `UserError` if tasks are evaluated without lm-eval, which `make train` does not install, or one is unknown.

    So it does if `eval.data_dir` lacks their data, which is loaded later.
    """
    every = config.trainer.eval_every
    if every is None:
        return
    if find_spec("lm_eval") is None:
        problem = "needs lm-eval, which is not installed: run `make setup`"
        raise ConfigError("trainer.eval_every", every, problem=problem)
    check_data_dir(config.eval.data_dir, config.eval.tasks)
    check_names(tuple(config.eval.tasks))


#: What wandb takes in the variable WANDB_MODE.
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


def _check_wandb() -> None:
    """Raise `UserError` if wandb would refuse its environment, or stop to ask for a login."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE={mode} is not allowed: it must be one of {', '.join(WANDB_MODES)}, or not set")
    import wandb

    for name in (name for name in os.environ if name.startswith("WANDB_")):
        try:
            wandb.Settings().update_from_env_vars({name: os.environ[name]})
        except (wandb.errors.UsageError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
            raise UserError(f"the environment variable {name} is not allowed: {reason}") from error
    if mode == "online" and not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False):
        raise UserError(
            "logger=wandb is not possible: wandb is not logged in; run `wandb login`, or set WANDB_API_KEY, or "
            "WANDB_MODE=offline"
        )
