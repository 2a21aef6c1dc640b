"""Activation checkpointing, torch.compile and FSDP2, applied to a LLaMA in place. Parameter names stay the same."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from models.llama import Llama
from models.loss import linear_cross_entropy, logit_grads

#: Operations whose outputs "selective" saves: matrix products and attention, which are slow to recompute.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply_activation_checkpointing(model: Llama, mode: str) -> None:
    """Recompute the activations of the blocks in the backward pass instead of saving them.

    The mode `full` saves the inputs of the blocks only, `selective` also the outputs of `SAVED_OPS`, and `none` all.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, [*SAVED_OPS])
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


def compile_model(model: Llama) -> None:
    """Compile the blocks and the loss with torch.compile. The blocks are alike, so that torch compiles one of them."""
    for block in model.model.layers:
        block.compile()
    model.loss = partial(linear_cross_entropy, chunk_fn=torch.compile(logit_grads, dynamic=False))


def apply_fsdp(model: Llama, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> None:
    """Shard the model with FSDP2: each block is a unit; embeddings, final norm and head are another.

    Parameters are sharded along the last dimension of the mesh, and with two (HSDP) replicated along the first. Weights
    are gathered in `dtype`; gradients are reduced, and sharded weights stored, in float32.
    """
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "score")


def materialize(model: Llama, device: torch.device) -> None:
    """Allocate the parameters of a model on the meta device, sharded or not, without initializing them."""
    model.to_empty(device=device)
    model.tie_weights()


def copy_full_weight(parameter: Tensor, weight: Tensor) -> None:
    """Copy a full weight, the same on every rank, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        local = weight.to(device=parameter.device, dtype=parameter.dtype)
        weight = distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(weight)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Set whether a sharded model reduces its gradients in the next backward pass, or accumulates them unreduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
