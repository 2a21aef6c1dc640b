"""One rank of FSDP2 with torchtitan's clipping and optimizers, as `python -m tests.zclip.torchtitan_rank OUT`."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.zclip.engine_packages import code_of
from tests.zclip.reference_loop import STEPS, batch, build_model
from zclip import ZClip

#: The step whose gradients are not finite.
NAN_STEP = 9


def batch_of(way: str, step: int) -> torch.Tensor:
    """(8, 5) inputs; NaN would reach the weights that are not in a scope."""
    return batch(step) * (torch.nan if step == NAN_STEP and way != "scope" else 1.0)


def main(out: str) -> None:
    """Train with the recipe, and with the strategy attached to all optimizers or to AdamW's parameters."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from torchtitan.distributed import utils

    dist.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for way in ("recipe", "attached", "scope"):
        model = build_model()
        fully_shard(model, mesh=mesh)
        groups = [
            ParamGroupConfig(pattern="bias", optimizer_name="Adam", optimizer_kwargs={"lr": 0.01}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01}),
        ]
        config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        optimizers = OptimizersContainer(config, model_parts=[model])
        strategy = ZClip(warmup_steps=5, z_thresh=2.0, scope="group:AdamW" if way == "scope" else None)
        recipe: dict[str, Any] = {}
        own = utils.clip_grad_norm_
        if way == "recipe":
            exec(compile(code_of("torchtitan.md"), "torchtitan.md", "exec"), recipe)
            recipe["zclip"] = strategy
        else:
            strategy.attach(optimizers, model)
        telemetry = []
        for step in range(STEPS):
            optimizers.zero_grad()
            model(batch_of(way, step).chunk(world)[rank]).square().mean().backward()
            norm = utils.clip_grad_norm_(model.parameters(), 1.0 if way == "recipe" else torch.inf, foreach=True)
            optimizers.step()
            telemetry.append(strategy.read_telemetry())
            if way != "scope":
                assert torch.allclose(norm.double(), strategy.telemetry["grad_norm"], equal_nan=True)
        utils.clip_grad_norm_ = own
        strategy.detach()
        weights = [p.detach().full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        results[way] = {"telemetry": telemetry, "weights": weights}
    torch.save(results, f"{out}/rank-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
