"""What a checkpoint must hold. It is checked before it is used: it may come from somebody else.

The configuration in a checkpoint says what else is in it: the shapes of the weights and of the optimizer's state, the
clipper's statistics, and the position in the data.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import zclip
from common.errors import one_line
from common.reading import check_record
from data.shapes import LoaderState
from models import Llama
from training.checkpoint.format import TensorSpec, is_valid, load_header, load_param_groups, tensor_specs, tensors_in
from training.checkpoint.rng import set_rng_states
from training.checkpoint.saved_config import checkpoint_config
from training.config.optim import OptimConfig
from training.config.optimizer import grouped, make_optimizer, state_names
from training.config.schema import Config
from training.config.strategy import clipping_strategy, is_ours, update_rule

#: What Lightning restores, and what this project adds.
KEYS = (
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
    "lr_schedulers", "config", "random", "metrics",
)  # fmt: skip

#: Fields of a counter of Lightning's loops.
COUNTS = {"ready", "started", "processed", "completed"}

#: Settings of each group of parameters that a run sets by itself, whatever its checkpoint says.
SET_BY_RUN = {"params", "lr", "initial_lr"}


def find_problem(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be used, in the words that follow its name; `None` if it can."""
    if not is_valid(checkpoint):
        return "is damaged"
    try:
        check_state(checkpoint)
    except ValueError as error:
        return f"is damaged ({one_line(error)})"
    return None


def check_state(checkpoint: Path) -> None:
    """Raise `ValueError`, with the part that is wrong, unless a checkpoint holds what its configuration says."""
    with _part("its configuration"):
        config = checkpoint_config(checkpoint)
        header = load_header(checkpoint)
    with _part("its step"):
        step = header["global_step"]
        _require(_is_count(step) and step > 0 and step == step_of(checkpoint), f"{step!r} is not that in its name")
        epochs = (0,) if config.fork_from is None else (0, 1)  # see `training.lightning_internals.reopen_epoch`
        _require(header["epoch"] in epochs, "Lightning's epoch is not 0")
        _require(re.match(r"[2-9]\.\d+\.\d+", header["pytorch-lightning_version"]), "of no version of Lightning")
    with _part("its tensors"):
        _require(all(map(_is_plain, tensors_in(header))), "some are sparse, or have no content")
    with _part("its weights"):
        specs = tensor_specs(checkpoint)
        model = _meta_model(config, specs)
        _check_tensors({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, specs, "state_dict")
    with _part("its optimizer"):
        groups = load_param_groups(checkpoint, header)
        _check_optimizer(groups, config.optim, model, specs, checkpoint.is_dir())
    with _part("its schedule"):
        _check_schedule(header["lr_schedulers"], step, len(groups))
    with _part("its loops"):
        _check_loops(header["loops"]["fit_loop"], step, config)
    with _part("its clipper"):
        _check_clipper(header["callbacks"], config)
    with _part("its rule over updates"):
        _check_rule(header["callbacks"], config)
    with _part("its random states"):
        set_rng_states(header["random"], only_check=True)
    with _part("its metrics"):
        columns = header.get("metrics", {})  # checkpoints of earlier versions have none
        _require(all(column.shape == (step,) and column.dtype == torch.int64 for column in columns.values()), "wrong")
        _require(not columns or {"tokens", "loss", "grad_norm"} <= columns.keys(), "incomplete")


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name; `None` if it has none."""
    match = re.fullmatch(r"step-([0-9]+)\.ckpt", checkpoint.name)
    return int(match[1]) if match else None


@contextmanager
def _part(name: str) -> Iterator[None]:
    """Name a part of a checkpoint in any error that its content causes."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        detail = (
            one_line(error, 200) if isinstance(error, ValueError) else f"{type(error).__name__} {one_line(error, 200)}"
        )
        raise ValueError(f"{name}: {detail}") from error


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its elements in the CPU's memory, one by one."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def _meta_model(config: Config, specs: Mapping[str, TensorSpec]) -> Llama:
    """Return a model without storage. A configuration of more layers than the checkpoint has tensors is not tried."""
    _require(config.model.num_hidden_layers <= len(specs), "fewer than the layers of its configuration")
    with torch.device("meta"):
        return Llama(config.model.llama)


def _check_tensors(expected: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], prefix: str) -> None:
    """Raise `ValueError` unless the tensors under a prefix are those expected, by name, shape and data type."""
    found = {name.removeprefix(f"{prefix}."): spec for name, spec in specs.items() if name.startswith(f"{prefix}.")}
    for name in sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"{name} is {'missing' if name in expected else 'unknown'}")
    for name, tensor in expected.items():
        like = TensorSpec(tuple(tensor.shape), tensor.dtype)
        _require(found[name] == like, f"{name} is {found[name]}, not {like}")


def _check_optimizer(
    groups: Sequence[Mapping[str, Any]],
    optim: OptimConfig,
    model: Llama,
    specs: Mapping[str, TensorSpec],
    sharded: bool,
) -> None:
    """Raise `ValueError` unless the groups have all parameters of the model, with the optimizer's settings and state.

    Of an optimizer of one's own, nothing is imported because a checkpoint names it. Its settings must be plain values,
    and its state must be that of parameters of the model.
    """
    parameters = grouped(optim, ((f"model.{name}", p) for name, p in model.named_parameters()))
    fresh = None if optim.target else make_optimizer(optim, _one_of_each(parameters), lr=1.0).param_groups
    expected: dict[str, Tensor] = {}
    keys: list[Any] = []
    for number, (group, (name, members)) in enumerate(zip(groups, parameters.items(), strict=True)):
        first = len(keys)
        keys += members if sharded else range(first, first + len(members))
        _require(group["params"] == keys[first:], "its parameters are others")
        _check_settings(group, optim, None if fresh is None else fresh[number])
        for key, parameter in zip(keys[first:], members.values(), strict=True):
            for entry, is_number in state_names(optim, name).items():
                expected[f"{key}.{entry}"] = torch.zeros((), device="meta") if is_number else parameter.detach()
    if optim.target is None:
        _check_tensors(expected, specs, "optimizer_0.state")
    known = tuple(f"optimizer_0.state.{key}." for key in keys)
    for name in (name for name in specs if name.startswith("optimizer_0.state.")):
        _require(name.startswith(known), f"{name} is unknown")


def _one_of_each(groups: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return a parameter of each group, by its name, with one element."""
    firsts = (next(iter(members.items())) for members in groups.values())
    return [(name, torch.zeros([1] * parameter.ndim)) for name, parameter in firsts]


def _check_settings(group: Mapping[str, Any], optim: OptimConfig, fresh: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` unless settings of a group are those that its optimizer has at first, or plain values."""
    for name, value in group.items():
        is_set = name in SET_BY_RUN or name in optim.arguments
        values = value if isinstance(value, list | tuple) else [value]
        is_plain = all(isinstance(one, int | float | str | None) for one in values)
        is_known = is_plain if fresh is None else name in fresh and value == fresh[name]
        _require(is_set or is_known, f"{name}={value!r}")


def _check_schedule(states: Any, step: int, groups: int) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    known = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict()
    (state,) = states
    _require(state["last_epoch"] == step, f"{state['last_epoch']!r} is not its step")
    for name, value in state.items():
        _require(type(value) is type(known[name]), f"{name}={value!r}")
    for name in ("base_lrs", "_last_lr"):
        _require(len(state[name]) == groups, f"{name} is not that of its groups")
        for rate in state[name]:
            _require(isinstance(rate, float) and math.isfinite(rate), f"{name}={rate!r}")
    _require(state["lr_lambdas"] in ([{}] * groups, [None] * groups), "lr_lambdas")


def _check_loops(fit_loop: Mapping[str, Any], step: int, config: Config) -> None:
    for name, state in fit_loop.items():
        if name.endswith("state_dict"):
            _require(isinstance(state, dict), name)
        elif name.endswith("optim_progress"):
            _check_progress(state["optimizer"]["step"], name)
            _check_progress(state["optimizer"]["zero_grad"], name)
        else:
            _check_progress(state, name)
    steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    _require(steps["ready"] == steps["completed"] == step, "they are of another step")
    _require(fit_loop["epoch_loop.batch_progress"]["total"].keys() == COUNTS, "its batches are not counted")
    _require(_is_count(fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"]), "its batches are not counted")
    (loader,) = fit_loop["state_dict"]["combined_loader"]
    position = check_record(LoaderState, loader)
    steps_and_skipped = step + position.skipped_batches
    is_there = position.sequences_consumed == steps_and_skipped * config.trainer.global_batch_size
    _require(is_there, "its position in the data is another's")
    start = position.data_start
    fits = start % config.trainer.global_batch_size == 0 and (start > 0 or config.fork_data == "same")
    _require(fits and (start == 0 or config.fork_from is not None), "the start of its data is another's")
    if config.data.mode == "stream":
        _require(position.stream is not None, "no stream's position")
        mixture = loader["stream"]["mixture"]
        if mixture is not None:
            sources = config.data.sources.keys()
            _require(mixture["streams"].keys() == mixture["bytes_read"].keys() == sources, "its sources are others")


def _check_progress(progress: Mapping[str, Any], name: str) -> None:
    """Raise `ValueError` unless this is a counter of one of Lightning's loops."""
    for part in ("total", "current"):
        counts = progress[part]
        _require(counts.keys() <= COUNTS and all(map(_is_count, counts.values())), f"{name} {counts!r}")
    _require(type(progress.get("is_last_batch", False)) is bool, name)


def _check_clipper(callbacks: Mapping[str, Any], config: Config) -> None:
    """Raise an error unless the strategy of a checkpoint can restore its state.

    Only strategies of `zclip` are tried: nothing is imported because a checkpoint names it. Others are tried when they
    are restored.
    """
    (state,) = callbacks["TimedClippingCallback"]["strategies"]
    _require(isinstance(state, dict), "its state is none")
    module, _, name = config.clip.target.rpartition(".")
    if module == "zclip" and name in zclip.__all__:
        clipping_strategy(config.clip).load_state_dict(state)


def _check_rule(callbacks: Mapping[str, Any], config: Config) -> None:
    """Raise an error unless the rule over updates of a checkpoint can restore its state, if it is one of `zclip`."""
    if config.update.target is not None:
        state = callbacks["UpdateRuleCallback"]["rule"]
        _require(isinstance(state, dict), "its state is none")
        if is_ours(config.update.target) and (rule := update_rule(config.update)) is not None:
            rule.load_state_dict(state)
