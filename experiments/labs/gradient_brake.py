"""A control: the brake's rule over the gradient norm in place of that of the update."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from zclip.apply import optimizer_parameters
from zclip.updates import UpdateBrake


class GradientBrake(UpdateBrake):
    """Lower the learning rate where the gradient norm is far above its usual level, by the equations of `UpdateBrake`.

    It tells whether the brake needs the norm of the update, which costs a pass over the optimizer's state. The norm is
    that of the clipped gradients, and telemetry has it as `update_norm`. It is for runs of one process without skipped
    steps.

    Args:
        arguments: those of `UpdateBrake`.
    """

    def before_step(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> Tensor:
        """Measure the gradients, and return the scale."""
        gradients = [p.grad for p in optimizer_parameters(optimizer) if p.grad is not None]
        with torch.no_grad():
            return self.observe(get_total_norm(gradients))
