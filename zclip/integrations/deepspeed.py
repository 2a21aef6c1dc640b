"""Clipping strategies in DeepSpeed's engine with ZeRO 1, 2 or 3: what `ClippingStrategy.attach` does with an engine.

The engine reduces, unscales, clips and steps in one call, on flat partitions that the parameters do not hold. It takes
the norm over all ranks itself, and passes it to the method `unscale_and_clip_grads` of its optimizer, once for each
group of parameters. `EngineAttachment` takes the place of that method. It is not public: seen with DeepSpeed 0.19.8.
The optimizer's `step` tells where the next norm begins, because a norm may be the same object as the one before.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from zclip.apply import scale_


def is_engine(optimizer: Any) -> bool:
    """Whether this is a DeepSpeed engine, or the optimizer inside one."""
    return type(optimizer).__module__.split(".")[0] == "deepspeed"


class EngineAttachment:
    """The hook of a strategy in one engine. DeepSpeed's own clipping is off while it is there.

    The norm costs nothing, as the engine computes it anyway. A step that clips scales the gradients in another pass.

    Args:
        engine: what `deepspeed.initialize` returns first, or its `optimizer`.
        observe: takes the norm of a step, 0-dim, NaN if it is not finite, and returns the coefficient, 0 for a skip.

    Raises:
        ValueError: the engine's optimizer is not of ZeRO 1, 2 or 3, computes no norm, or has a strategy already.
    """

    #: What calls the strategy, for messages.
    caller: ClassVar[str] = "engine.step()"

    def __init__(self, engine: Any, observe: Callable[[Tensor], Tensor]) -> None:
        zero: Any = engine if hasattr(engine, "unscale_and_clip_grads") else getattr(engine, "optimizer", None)
        if not type(zero).__name__.startswith("DeepSpeedZeroOptimizer"):
            raise ValueError(
                f"attach() needs a DeepSpeed engine with ZeRO stage 1, 2 or 3; this one has {type(zero).__name__}"
            )
        if not getattr(zero, "compute_grad_norm", True):
            raise ValueError("zero_optimization.compute_grad_norm=false is not allowed: a strategy needs the norm")
        if "unscale_and_clip_grads" in vars(zero):
            raise ValueError("a strategy is attached to this engine already: detach() that one first")
        self._zero, self._observe = zero, observe
        self._unscale = zero.unscale_and_clip_grads
        self._norm: Any = None  # of this step; `None` before its first group
        self._coefficient = torch.ones(())  # for that norm
        zero.unscale_and_clip_grads = self._unscale_and_clip
        self._step, self._own_step = zero.step, vars(zero).get("step")
        zero.step = self._begin_step

    def remove(self) -> None:
        """Give the engine its own clipping back. A `step` that others have put over this one stays."""
        zero = self._zero
        del zero.unscale_and_clip_grads
        if zero.step == self._begin_step:
            del zero.step
            if self._own_step is not None:
                zero.step = self._own_step

    def _begin_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forget the norm of the step before, and take the step."""
        self._norm = None
        return self._step(*args, **kwargs)

    def _unscale_and_clip(self, group: Any, total_norm: Any) -> None:
        """Take the place of DeepSpeed's method, whose arguments these are.

        Args:
            group: with ZeRO 1 and 2 gradients, or lists of them; with ZeRO 3 the number of a group of parameters.
            total_norm: norm of all gradients times the loss scale, the same object for all groups of a step; -1 if it
                is not finite.
        """
        zero = self._zero
        if total_norm is not self._norm:
            norm = torch.as_tensor(total_norm, device=getattr(total_norm, "device", "cpu")) / zero.loss_scale
            self._norm, self._coefficient = total_norm, self._observe(torch.where(norm < 0, torch.nan, norm))
        clip_grad, zero.clip_grad = zero.clip_grad, 0.0
        try:
            self._unscale(group, total_norm)
        finally:
            zero.clip_grad = clip_grad
        gradients = [zero.fp32_partitioned_groups_flat[group].grad] if isinstance(group, int) else list(_flat(group))
        with torch.no_grad():
            coefficient = self._coefficient
            scale_(gradients, coefficient, (coefficient == 0).to(gradients[0].device))


def _flat(gradients: Any) -> Iterator[Tensor]:
    for gradient in gradients:
        if isinstance(gradient, Tensor):
            yield gradient
        else:
            yield from gradient
