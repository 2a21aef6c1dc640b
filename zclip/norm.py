"""Norms of gradients of any layout: plain tensors, DTensors on any meshes, FSDP1 shards, pipeline stages.

On an accelerator one foreach pass sums the squares of each tensor in float32; on a CPU that would be inexact, so
`zclip.cpu_norm` sums them. Squares overflow above 1.8e19, so a larger norm counts as infinite. Squares of float64
gradients are float64.

Sums across tensors and ranks are float64. The sum of a shard is all-reduced over the process groups that shard its
parameter and over no others, so replicated gradients count once. These groups are derived from the parameters, not from
their gradients: all ranks then enter the same collectives in the same order, even a rank without gradients.
"""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from zclip.cpu_norm import cpu_norms

Parameters = nn.Module | Tensor | Iterable["Parameters"]
Groups = tuple[dist.ProcessGroup, ...]

FSDP1_MODULE = "FSDP1 shards parameters, and only its module knows how: step(model), or attach(optimizer, model)"


class Shard(NamedTuple):
    """A parameter, and the process groups over which it is sharded; empty if this rank holds all of it."""

    parameter: Tensor
    groups: Groups


def parameters_of(models: Parameters) -> list[Shard]:
    """Return the distinct parameters of modules, tensors and (nested) iterables of them, in order.

    Frozen parameters are among them: an optimizer steps with any gradient, also one from before the freezing. Those
    that can have no gradient, such as quantized weights, are not.

    Raises:
        TypeError: `models` contains something else, such as a name or an optimizer.
        ValueError: a parameter that FSDP1 has flattened comes without its module: its other shards are not known.
    """
    listing = _Listing({}, {}, set())
    listing.add(models, None)
    groups = listing.fsdp1
    return [
        Shard(parameter, groups.get(key) or _mesh_groups(parameter))
        for key, parameter in listing.parameters.items()
        if parameter.is_floating_point() or parameter.is_complex()
    ]


class _Listing(NamedTuple):
    """Distinct parameters by their ids, process groups of those that FSDP1 shards, and ids of those that it ignores."""

    parameters: dict[int, Tensor]
    fsdp1: dict[int, Groups]
    ignored: set[int]

    def add(self, item: Parameters, fsdp1: Groups | None) -> None:
        """Add the parameters of `item`, which FSDP1 shards over these groups; `None`: it is in no module of FSDP1."""
        if isinstance(item, Tensor):
            self._add_parameters([item], fsdp1)
        elif isinstance(item, nn.Module):
            self._add_module(item, fsdp1)
        elif isinstance(item, str):
            problem = "is not a parameter: pass modules, parameters, or iterables of either, without names"
            raise TypeError(f"{item!r} {problem}")
        elif isinstance(item, Iterable):
            items = [*item]
            if all(isinstance(inner, Tensor) for inner in items):  # thousands of them, in an optimizer's groups
                self._add_parameters(items, fsdp1)
            else:
                for inner in items:
                    self.add(inner, fsdp1)
        else:
            raise TypeError(
                f"step() takes modules, parameters, and iterables of either, not {type(item).__name__}; "
                "an optimizer goes into optimizer="
            )

    def _add_module(self, root: nn.Module, fsdp1: Groups | None) -> None:
        """Add parameters in the order of `root.parameters()`, which takes several times as long."""
        if isinstance(root, FullyShardedDataParallel):
            fsdp1 = _fsdp1_groups(root)
            self.ignored.update(map(id, root._ignored_params))
        pending = [root]
        while pending:
            module = pending.pop()
            if isinstance(module, FullyShardedDataParallel) and module is not root:
                self._add_module(module, fsdp1)
                continue
            if module._parameters:
                self._add_parameters(module._parameters.values(), fsdp1)
            if module._modules:
                pending.extend(child for child in reversed(module._modules.values()) if child is not None)

    def _add_parameters(self, parameters: Iterable[Tensor | None], fsdp1: Groups | None) -> None:
        for parameter in parameters:
            key = id(parameter)
            if parameter is not None and key not in self.parameters:
                if fsdp1 is None and is_flattened(parameter):
                    raise ValueError(FSDP1_MODULE)
                self.parameters[key] = parameter
                if fsdp1 and key not in self.ignored:
                    self.fsdp1[key] = fsdp1


def listed(models: Parameters) -> Parameters:
    """Return modules and tensors as they are, and iterables of them as lists: a generator can be read once only."""
    if isinstance(models, nn.Module | Tensor | str) or not isinstance(models, Iterable):
        return models
    return [listed(inner) for inner in models]


def device_of(shards: Sequence[Shard], process_group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device of the first parameter that is trained, or of the first one.

    A rank of a process group that holds no parameter has a device with which the group communicates.
    """
    if not shards and process_group is not None:
        accelerator = None if dist.get_backend(process_group) in ("gloo", "mpi") else torch.accelerator
        return torch.device("cpu") if accelerator is None else accelerator.current_accelerator() or torch.device("cpu")
    return next((shard for shard in shards if shard.parameter.requires_grad), shards[0]).parameter.device


def _mesh_groups(parameter: Tensor) -> Groups:
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    sharded_dims = (dim for dim, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate))
    return tuple(mesh.get_group(dim) for dim in sharded_dims)


def _fsdp1_groups(module: FullyShardedDataParallel) -> Groups:
    handle, group = module._handle, module.process_group
    return (group,) if handle is not None and group is not None and handle.uses_sharded_strategy else ()


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has flattened a parameter: only its module knows over which ranks it is sharded."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return this rank's shard of each gradient, in the layout of its parameter; `None` where a gradient is missing.

    Raises:
        TypeError: a gradient is sparse or complex, or not on its parameter's mesh.
    """
    gradients = [parameter.grad for parameter in parameters]
    plain = {nn.Parameter, Tensor, type(None)}
    if {*map(type, gradients), *map(type, parameters)} <= plain:
        present = [gradient for gradient in gradients if gradient is not None]
        complex_dtype = any(dtype.is_complex for dtype in {gradient.dtype for gradient in present})
        if not complex_dtype and {gradient.layout for gradient in present} <= {torch.strided}:
            return gradients
    return [local_gradient(parameter) for parameter in parameters]


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return this rank's shard of a parameter's gradient, in the layout of the parameter; `None` without a gradient.

    Raises:
        TypeError: the gradient is sparse or complex, or not on the parameter's mesh.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided or gradient.is_complex():
        kind = "complex" if gradient.is_complex() else "sparse"
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is {kind}: it must be dense and real"
        )
    if _mesh(gradient) != _mesh(parameter):
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is not on the parameter's mesh: both must "
            "be plain tensors, or DTensors on one mesh"
        )
    if not isinstance(gradient, DTensor):
        return gradient
    assert isinstance(parameter, DTensor)
    if gradient.placements != parameter.placements:
        gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of norms and statistics: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def scalar(name: str, value: object, device: torch.device | str = "cpu") -> Tensor:
    """Return a real number, or a tensor of one element, as a 0-dim tensor, or raise `TypeError`.

    A DTensor, such as the norm that torch's `clip_grad_norm_` returns under FSDP2, is summed up over its mesh.

    Args:
        name: the argument, for the message.
        value: the number or tensor. A truth value is no number.
        device: that of the tensor that a number becomes, of `statistics_dtype`. Default: the CPU.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        device = torch.device(device)
        return torch.full((), float(value), dtype=statistics_dtype(device), device=device)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}= takes a real number or a 0-dim real tensor, not {type(value).__name__}{shape}")
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).reshape(())


def tensor_norms(shards: Sequence[Shard], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the 2-norm of each gradient, over all ranks that hold a shard of it.

    Args:
        shards: n parameters, the same on every rank of their groups.
        gradients: this rank's shard of each gradient, `None` where a gradient is missing; any floating dtypes.

    Returns:
        (n,) of `statistics_dtype`, on the device of the first gradient, or parameter if there are none; 0 where a
        gradient is missing.
    """
    tensors = [gradient for gradient in gradients if gradient is not None]
    device = tensors[0].device if tensors else device_of(shards)
    norms = local_norms(tensors, device) if tensors else torch.zeros(0, dtype=statistics_dtype(device), device=device)
    if len(tensors) < len(gradients):
        present, zero = iter(norms.unbind()), norms.new_zeros(())
        norms = torch.stack([zero if gradient is None else next(present) for gradient in gradients])
    return sum_over_ranks(shards, norms.square()).sqrt()


def local_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the 2-norm of each tensor, (n,) of `statistics_dtype` on the device."""
    if all(tensor.is_cpu for tensor in tensors):
        return cpu_norms(tensors)
    sum_dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch._foreach_norm(list(tensors), 2, dtype=sum_dtype)
    return torch.stack([norm.to(device) for norm in norms]).to(statistics_dtype(device))


def sum_over_ranks(shards: Sequence[Shard], values: Tensor) -> Tensor:
    """Return the sum of each of (n,) values over the ranks that shard its parameter; may overwrite the values."""
    by_groups: dict[Groups, list[int]] = {}
    for i, shard in enumerate(shards):
        if shard.groups:
            by_groups.setdefault(shard.groups, []).append(i)
    for groups, members in by_groups.items():
        all_shards = len(members) == len(shards)
        rows = list(values.unbind())
        part = values if all_shards else torch.stack([rows[i] for i in members])
        for group in groups:
            dist.all_reduce(part, group=group)
        if not all_shards:
            for i, row in zip(members, part.unbind(), strict=True):
                rows[i] = row
            values = torch.stack(rows)
    return values


def norm_like(norm: Tensor, shards: Sequence[Shard], process_group: dist.ProcessGroup | None) -> Tensor:
    """Return the 2-norm of the gradients of other parameters, maybe none, with the device and dtype of `norm`.

    They are not scaled, so they may be sparse or complex.
    """
    gradients = [_elements(shard.parameter) for shard in shards]
    norms = tensor_norms(shards, gradients).to(norm) if shards else norm.new_zeros(1)
    return global_norm(norms, process_group)


def _elements(parameter: Tensor) -> Tensor | None:
    """Return a dense real tensor with the norm of this rank's shard of a gradient; `None` without a gradient."""
    gradient = parameter.grad
    if gradient is None or not (gradient.layout == torch.sparse_coo or gradient.is_complex()):
        return local_gradient(parameter)
    elements = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(elements.resolve_conj()) if elements.is_complex() else elements


def global_norm(norms: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Return the 2-norm of gradients with these (n,) norms, 0-dim and of their dtype.

    A `process_group` has ranks that hold other parameters of the model, such as pipeline stages; they count as well.
    """
    if process_group is None:
        return torch.linalg.vector_norm(norms)
    total = norms.square().sum()
    dist.all_reduce(total, group=process_group)
    return total.sqrt()
