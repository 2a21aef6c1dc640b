"""What is done to a LLaMA for speed and size, from outside: it stays the module that it is, under the same names."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from models.llama import Llama
from models.loss import linear_cross_entropy, slopes

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")

#: Results that "selective" keeps: those of matrix products and of attention, which are the slow ones to make again.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply_activation_checkpointing(model: Llama, how: str) -> None:
    """Make activations of the blocks again in the backward pass instead of keeping them.

    Args:
        model: whose blocks are wrapped.
        how: `full`: only the blocks' inputs are kept; `selective`: also the results of matrix products and attention;
            `none`: everything.
    """
    if how == "none":
        return
    options: dict[str, Any] = {"context_fn": _selective} if how == "selective" else {}
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


def compile_model(model: Llama) -> None:
    """Compile each block by itself, and the loss, with torch.compile: as the blocks are alike, one is compiled."""
    for block in model.model.layers:
        block.compile()
    model.loss = partial(linear_cross_entropy, between=torch.compile(slopes, dynamic=False))


def shard(model: Llama, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> None:
    """Shard the model with FSDP2: each block is gathered when its turn comes, embeddings, last norm and head together.

    Args:
        model: moved to the mesh's device as it is sharded, unless it is on the meta device.
        mesh: of one dimension, along which parameters are sharded; of two, replicated along the first (HSDP).
        dtype: in which weights are gathered and used; gradients are reduced, and weights kept, in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else None
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "score")


def materialize(model: Llama, device: torch.device) -> None:
    """Give a model that was made on the meta device, and sharded there or not, memory with nothing in it yet."""
    model.to_empty(device=device)
    model.tie_weights()


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole weight, which every process has, into a parameter, of which this process may have a shard."""
    if isinstance(parameter, DTensor):
        here = whole.to(device=parameter.device, dtype=parameter.dtype)
        whole = distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def _selective() -> Any:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Say whether a sharded model reduces its gradients in the next backward pass, or adds them up where they are."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
