"""From the section `optim` to an optimizer, and what is known of it before a run has one."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from common.errors import ConfigError, one_line
from models import Llama, LlamaConfig
from training.config.optim import OptimConfig
from training.config.strategy import check_arguments, find_class, refuse_exit
from training.muon import MuonAdamW
from zclip.arguments import ArgumentError
from zclip.updates import OptimizerRule
from zclip.updates.norm import check_optimizer as check_supported

#: Classes of the optimizers by their names.
CLASSES: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "muon": MuonAdamW}
#: What an optimizer of one's own gets besides its arguments.
SUPPLIED = ("params", "lr")


def optimizer_class(optim: OptimConfig) -> type[Optimizer]:
    """Return the class of an optimizer; raise `ConfigError` if `_target_` names none."""
    if optim.target is None:
        return CLASSES[optim.name]
    return find_class("optim", optim.target, Optimizer, "a subclass of torch.optim.Optimizer")


def group_of(optim: OptimConfig, name: str, dimensions: int) -> str:
    """Return the group of a parameter of the model, by its name and its number of dimensions.

    Muon trains the matrices of the blocks. All other optimizers have one group, which is named by their class.
    """
    if optim.name != "muon":
        return CLASSES[optim.name].__name__ if optim.target is None else optim.target.rpartition(".")[2]
    return "Muon" if dimensions == 2 and "layers." in name else "AdamW"


def grouped(optim: OptimConfig, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the named parameters of each group, in the order of the optimizer's groups."""
    groups: dict[str, dict[str, Tensor]] = {"Muon": {}, "AdamW": {}} if optim.name == "muon" else {}
    for name, parameter in parameters:
        groups.setdefault(group_of(optim, name, parameter.ndim), {})[name] = parameter
    return groups


def make_optimizer(optim: OptimConfig, parameters: Iterable[tuple[str, Tensor]], lr: float) -> Optimizer:
    """Return a new optimizer of named parameters; raise `ConfigError` if `_target_` names no class."""
    groups = [[*group.values()] for group in grouped(optim, parameters).values()]
    made_by: Any = optimizer_class(optim)
    return made_by(*groups, lr=lr, **optim.arguments)


def check_optimizer(optim: OptimConfig, rule: OptimizerRule | None, rule_name: str) -> None:
    """Raise `UserError` unless the optimizer can be made and takes a step, and a rule over updates knows that step.

    An optimizer of one's own takes its step on a few numbers.
    """
    if optim.target is not None:
        if optim.name in CLASSES:
            problem = f"is not possible with optim._target_={optim.target}: give both after optim=custom"
            raise ConfigError("optim.name", optim.name, problem=problem)
        check_arguments("optim", optimizer_class(optim), optim.arguments, SUPPLIED)
        state_bytes_of_element(optim)
    if rule is not None:
        try:
            check_supported(small_optimizer(optim), rule.optimizers)
        except TypeError as error:
            problem = f"is not possible with optim.name={optim.name}: {error}"
            raise ConfigError("update.name", rule_name, problem=problem) from error


def state_names(optim: OptimConfig, group: str) -> dict[str, bool]:
    """Return what the state of a parameter has in a group, and whether it is one number; otherwise it is a moment.

    It is not known of an optimizer of one's own.
    """
    if group == "AdamW":
        names = {"step": True, "exp_avg": False, "exp_avg_sq": False}
        return names | ({"max_exp_avg_sq": False} if optim.amsgrad else {})
    return {"momentum_buffer": False} if group == "Muon" or optim.momentum else {}


def state_differences(optim: OptimConfig, other: OptimConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield settings, with both values, by which one optimizer cannot continue from the state of another."""
    if (optim.target is None or other.target is None) and optim.name != other.name:
        yield "name", optim.name, other.name
    elif optim.target != other.target:
        yield "_target_", optim.target, other.target
    elif optim.target is not None:  # its name is a label, and only its state shows what its arguments mean
        ours, theirs = optim.arguments, other.arguments
        changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        if changed and _own_state(optim).keys() != _own_state(other).keys():
            yield changed[0], ours.get(changed[0]), theirs.get(changed[0])
    elif optim.amsgrad != other.amsgrad:
        yield "amsgrad", optim.amsgrad, other.amsgrad
    elif optim.name == "sgd" and bool(optim.momentum) != bool(other.momentum):
        yield "momentum", optim.momentum, other.momentum


def state_bytes(optim: OptimConfig, model: LlamaConfig) -> float:
    """Return the bytes of the optimizer's state for all parameters of a model, in float32."""
    if optim.target is not None:
        return state_bytes_of_element(optim) * model.parameters
    if optim.name != "muon":
        return _moment_bytes(optim, optimizer_class(optim).__name__) * model.parameters
    with torch.device("meta"):
        groups = grouped(optim, Llama(model).named_parameters())
    return sum(_moment_bytes(optim, name) * sum(p.numel() for p in group.values()) for name, group in groups.items())


def _moment_bytes(optim: OptimConfig, group: str) -> int:
    """Return the bytes of the state for each element of the parameters in a group."""
    return 4 * sum(not is_number for is_number in state_names(optim, group).values())


def state_bytes_of_element(optim: OptimConfig) -> float:
    """Return the bytes of the state for each element of a matrix of 64 x 64, after one step.

    Raises:
        ConfigError: the optimizer cannot be made with its arguments, or cannot take a step.
    """
    state = _own_state(optim)
    tensors = (value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)
    return sum(value.nbytes for value in tensors) / 64**2


def _own_state(optim: OptimConfig) -> dict[str, Any]:
    """Return the state of a matrix of 64 x 64, after one step of an optimizer of one's own."""
    with refuse_exit("optim", optim.target):
        try:
            optimizer = small_optimizer(optim)
            optimizer.step()
        except (ArgumentError, ConfigError) as error:
            raise ConfigError(f"optim.{error.field}", error.value, problem=error.problem) from error
        except Exception as error:  # the class may do anything
            problem = f"cannot take a step with its arguments ({type(error).__name__}: {one_line(error)})"
            raise ConfigError("optim._target_", optim.target, problem=problem) from error
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def small_optimizer(optim: OptimConfig) -> Optimizer:
    """Return an optimizer of a 64 x 64 matrix and a vector, which have gradients, under names of a model."""
    shapes = {"layers.0.q_proj.weight": (64, 64), "norm.weight": (64,)}
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return make_optimizer(optim, parameters.items(), lr=1e-3)
