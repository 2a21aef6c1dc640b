"""One rank of training in DeepSpeed's engine, as `python -m tests.zclip.deepspeed_rank OUT`: a process of its own.

For each stage of ZeRO and precision it trains the model of the plain loop with a strategy attached, and saves what
comes of it.
"""

import itertools
import os
import sys

import torch

from tests.zclip.reference_loop import STEPS, batch, build_model
from zclip import AGC, AdaGC, ZClip

#: The step whose gradients are not finite.
NAN_STEP = 9
#: Settings of the engine, and the dtype of its weights.
PRECISIONS = {
    "fp32": ({}, torch.float32),
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}, torch.float16),
}


def batch_with_nan(step: int) -> torch.Tensor:
    """(8, 5) inputs."""
    return batch(step) * (torch.nan if step == NAN_STEP else 1.0)


def main(out: str) -> None:
    """Train with ZeRO 1, 2 and 3 in each precision, and save telemetry and weights."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses fp16 on CPUs
    deepspeed.ops.__compatible_ops__.clear()  # nothing is compiled
    deepspeed.init_distributed(dist_backend="gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for (precision, (settings, dtype)), stage in itertools.product(PRECISIONS.items(), (1, 2, 3)):
        model, strategy = build_model(), ZClip(warmup_steps=5, z_thresh=2.0)
        config = {
            "train_micro_batch_size_per_gpu": 8 // world,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **settings,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=config
        )
        strategy.attach(engine)
        refusals = []
        for other in (AdaGC(), AGC(), ZClip(scope="*"), ZClip()):
            try:
                other.attach(engine)
            except ValueError as error:
                refusals.append(str(error))
        telemetry = []
        for step in range(STEPS):
            inputs = batch_with_nan(step).chunk(world)[rank].to(dtype)
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
            telemetry.append(strategy.read_telemetry())
        if stage == 3:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                weights = [p.detach().float().clone() for p in model.parameters()]
        else:
            weights = [p.detach().float().clone() for p in model.parameters()]
        strategy.detach()
        results[precision, stage] = {
            "telemetry": telemetry,
            "weights": weights,
            "refusals": refusals,
            "own": "unscale_and_clip_grads" not in vars(engine.optimizer) and engine.optimizer.clip_grad,
        }
    torch.save(results, f"{out}/rank-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
