"""Which tensor a statistic is of: names of parameters, and the statistics that a tensor finds under its name."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from zclip.norm import Parameters, Shard
from zclip.saved_state import is_plain, refuse

#: Names under which wrappers hold the module that they wrap: torch.compile, FSDP1, checkpointing, Lightning Fabric.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
#: Wrappers whose only child is the module that they wrap.
PARALLEL = (DistributedDataParallel, DataParallel)


class TensorId(NamedTuple):
    """What a saved state knows of a tensor.

    Attributes:
        name: the parameter's name in its module; its position among the tensors that were given, if they were given
            without a module; `None` in states from before names were saved.
        shape: shape of the whole parameter; `None` where only a flat shard of it is known (FSDP1).
    """

    name: str | int | None
    shape: list[int] | None


def parameter_names(models: Parameters) -> dict[int, str]:
    """Return the names of the parameters of the modules among `models`, by the parameters' ids.

    Names are those of the module without its wrappers. Of several names of one parameter (tied weights) the first in
    alphabetical order counts, whichever module comes first. Of several modules each has its number before its names.
    """
    modules = list({id(module): module for module in _modules(models)}.values())
    names: dict[int, str] = {}
    for i, module in enumerate(modules):
        # A parameter of two modules is the first one's.
        names = _module_names(module, f"{i}." if len(modules) > 1 else "") | names
    return names


def _module_names(root: nn.Module, prefix: str) -> dict[int, str]:
    """Return the names of a module's parameters, by their ids; `named_parameters` takes several times as long."""
    names: dict[int, str] = {}
    pending = [(root, prefix)]
    while pending:
        module, prefix = pending.pop()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full, key = prefix + name, id(parameter)
                if key not in names or full < names[key]:
                    names[key] = full
        if module._modules:
            wraps = isinstance(module, PARALLEL)
            for name, child in module.named_children():
                pending.append((child, prefix if wraps or name in WRAPPED else f"{prefix}{name}."))
    return names


def _modules(models: Parameters) -> Iterable[nn.Module]:
    if isinstance(models, nn.Module):
        yield models
    elif not isinstance(models, Tensor):
        for inner in models:
            yield from _modules(inner)


def identify(shards: Sequence[Shard], names: dict[int, str]) -> list[TensorId]:
    """Return what is known of these parameters, in their order."""
    return [TensorId(names.get(id(shard.parameter), i), _shape(shard)) for i, shard in enumerate(shards)]


def _shape(shard: Shard) -> list[int] | None:
    flat = shard.groups and not isinstance(shard.parameter, DTensor)
    return None if flat or is_lazy(shard.parameter) else list(shard.parameter.shape)


def find(
    strategy: str,
    saved: Sequence[TensorId],
    objects: Sequence["weakref.ref[Tensor]"],
    shards: Sequence[Shard],
    current: Sequence[TensorId],
) -> list[int | None]:
    """Return for each parameter the index of its statistics; `None` if it has none and starts fresh.

    A parameter that had its statistics in this process keeps them. Otherwise one with a name has those of its name and
    shape. Parameters without names have those of their position, and must be as many and of the same shapes as before.

    Args:
        strategy: the strategy's name, for messages.
        saved: n tensors that statistics are of.
        objects: the n parameters, if the statistics are from this process; empty if they were loaded.
        shards: m parameters that need statistics.
        current: what is known of these.

    Raises:
        ValueError: the statistics cannot be of these parameters.
    """
    positions = {id(ref()): i for i, ref in enumerate(objects) if ref() is not None}
    found = [positions.get(id(shard.parameter)) for shard in shards]
    is_known = any(i is not None for i in found)
    if is_known or all(isinstance(tensor.name, str) for tensor in (*saved, *current)):
        by_name: dict[object, int] = {
            tensor.name: i for i, tensor in enumerate(saved) if i not in found and isinstance(tensor.name, str)
        }
        for k, tensor in enumerate(current):
            i = by_name.get(tensor.name) if found[k] is None else None
            if i is not None and _match(saved[i], tensor):
                found[k] = i
        if all(i is None for i in found):
            raise ValueError(
                f"{strategy} has statistics of {_list(saved)}, but step() was given {_list(current)}: use one strategy "
                "for one model"
            )
        return found
    order = list(range(len(current)))
    if len(saved) != len(current) and saved[0].name is None:  # of parameters that required gradients, in older states
        order = [k for k in order if shards and shards[k].parameter.requires_grad]
    if len(saved) != len(order) or not all(_match(saved[i], current[k]) for i, k in enumerate(order)):
        raise ValueError(
            f"{strategy} has statistics of {_list(saved)}, but step() was given {_list(current)}: give it the module, "
            "whose names tell its parameters apart, or always the same parameters"
        )
    return [order.index(k) if k in order else None for k in range(len(current))]


def checked_tensor_ids(strategy: str, state_dict: Mapping[str, Any]) -> list[TensorId]:
    """Return which tensors the statistics in a saved state are of; raise `ValueError` if it does not say.

    States of before names were saved have their number only.
    """
    state = state_dict["state"]
    if "names" not in state_dict:
        values = state.values() if isinstance(state, Mapping) else ()
        count = next((len(value) for value in values if is_plain(value) and value.ndim == 1), 1)
        return [TensorId(None, None)] * count
    names, shapes = state_dict["names"], state_dict.get("shapes")
    if not isinstance(names, list) or not names:
        refuse(strategy, "names", names, "a list of the names of tensors")
    if not isinstance(shapes, list) or len(shapes) != len(names):
        refuse(strategy, "shapes", shapes, f"a list of the shapes of {len(names)} tensors")
    seen: set[str | int] = set()
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        if name is not None:
            if type(name) not in (str, int) or name in seen:
                refuse(strategy, f"names[{i}]", name, "a name or position that no other tensor has")
            seen.add(name)
        sizes = shape if isinstance(shape, list) else [-1]
        if shape is not None and not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            refuse(strategy, f"shapes[{i}]", shape, "a list of integers from 0")
    return [TensorId(name, shape) for name, shape in zip(names, shapes, strict=True)]


def _match(one: TensorId, other: TensorId) -> bool:
    return one.shape is None or other.shape is None or one.shape == other.shape


def _list(tensors: Sequence[TensorId]) -> str:
    """Return the number of tensors and the first three, in words."""
    words = []
    for name, shape in tensors[:3]:
        known = name if isinstance(name, str) else "" if name is None else f"parameter {name}"
        words.append(" ".join(filter(None, [known, f"of shape {tuple(shape)}" if shape is not None else ""])))
    more = ", ..." if len(tensors) > 3 else ""
    inner = f" ({', '.join(filter(None, words))}{more})" if any(words) else ""
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}{inner}"
