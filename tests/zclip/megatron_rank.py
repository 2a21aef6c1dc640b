"""Training by Megatron's optimizers with the code of its page, as `python -m tests.zclip.megatron_rank OUT`.

megatron-core asks for CUDA by name; here the CPU answers. All else is its own code.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests.zclip.engine_packages import code_of
from tests.zclip.reference_loop import STEPS, batch, build_model
from zclip import ZClip


class CudaIsCpu(TorchFunctionMode):
    """Makes tensors for CUDA on the CPU, and calls a float tensor one of CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        is_name = func is torch.Tensor.type and isinstance(result, str)
        return result.replace("torch.Float", "torch.cuda.Float") if is_name else result


def main(out: str) -> None:
    """Train with one optimizer and with a chain of two; save telemetry and weights."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    recipe: dict[str, Any] = {}
    exec(compile(code_of("megatron.md"), "megatron.md", "exec"), recipe)
    results = {}
    for chained in (False, True):
        recipe["zclip"] = strategy = ZClip(warmup_steps=5, z_thresh=2.0, on_nonfinite="raise")
        model = build_model()
        parts = [model[0], model[2]] if chained else [model]
        config = OptimizerConfig(optimizer="sgd", lr=0.1, clip_grad=1.0, params_dtype=torch.float32)
        telemetry = []
        with CudaIsCpu():
            optimizers = [
                FP32Optimizer(torch.optim.SGD(part.parameters(), 0.1), config, lambda *_: None) for part in parts
            ]
            optimizer = ChainedOptimizer(optimizers) if chained else optimizers[0]
            for step in range(STEPS):
                optimizer.zero_grad()
                model(batch(step)).square().mean().backward()
                for parameter in model.parameters():
                    parameter.main_grad = parameter.grad.clone()  # as Megatron's DDP keeps them
                done, norm, _ = optimizer.step()
                telemetry.append(strategy.read_telemetry())
                assert done and abs(norm - telemetry[-1]["grad_norm"]) < 1e-6
        results[chained] = {"telemetry": telemetry, "weights": [p.detach() for p in model.parameters()]}
        last = [torch.full_like(p, torch.nan) for p in model.parameters()]
        for parameter, gradient in zip(model.parameters(), last, strict=True):
            parameter.main_grad = gradient
        try:
            with CudaIsCpu():
                optimizer.step()
        except FloatingPointError as error:
            results[chained]["raised"] = str(error)
    torch.save(results, f"{out}/megatron.pt")


if __name__ == "__main__":
    main(sys.argv[1])
