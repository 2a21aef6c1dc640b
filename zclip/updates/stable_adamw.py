"""StableAdamW: lower the learning rate of each tensor whose gradients have outgrown its second moment."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam, Optimizer

from zclip.updates.base import OptimizerRule, takes_step
from zclip.updates.rms import update_rms

#: An RMS up to this much above 1 is 1 up to rounding. It is 1 in the first step of every tensor.
ROUNDING = 1e-5


class StableAdamW(OptimizerRule):
    """Divide the learning rate of each tensor by its RMS (Wortsman et al., arXiv 2304.13013, Algorithm 2).

    With g the gradient of a tensor, v its second moment after the step, corrected for its bias, and eta the rate of
    its group::

        RMS = sqrt(mean(g^2 / max(v, eps^2)))
        eta <- eta / max(1, RMS)

    The optimizer is `torch.optim.AdamW` or `Adam`, fused or not, and takes the step with these rates by itself. As in
    the paper, the rate of AdamW's decoupled weight decay is divided too; an L2 penalty of `Adam` is a part of g. With
    AMSGrad, v is its maximum. A tensor whose RMS is at most 1 takes the step of the plain optimizer, bit for bit. The
    others take that of the plain optimizer at their own rates. The RMS is computed in float32 or wider, so it is exact
    up to rounding.

    There are no settings: betas and eps are those of each parameter group. There are no statistics either, beyond
    counters: the next step depends on the optimizer's state alone.

    The mean is over a whole tensor, however it is sharded (DTensor). One all-reduce of a number for each tensor serves
    all parameters of a mesh. On an accelerator nothing waits for the device if the optimizer is fused or capturable;
    each tensor then is a call of torch's kernel, because the host does not know which rates are the same. For other
    optimizers each step waits once a group. Gradients are read once more, and second moments.

    A tensor with gradients of NaN or infinity keeps its rate, and the telemetry of the step is NaN (or false).

    Telemetry:

    - `update_rms`: the highest RMS of a tensor.
    - `lowest_update_scale`: the lowest factor on the rate of a tensor, 1 / max(1, RMS).
    - `update_clipped`: whether the rate of any tensor was divided.
    - `update_clipped_tensors`: the number of these tensors.
    """

    optimizers = (Adam,)

    def before_step(self, optimizer: Optimizer, process_group: dist.ProcessGroup | None) -> Tensor:
        """Measure the RMS of each tensor, and return the factors on their rates, (n,)."""
        with torch.no_grad():
            rms = update_rms(optimizer)
            scales = torch.where(rms > 1 + ROUNDING, 1 / rms, 1.0)  # NaN is not above
            self._prepare_state(rms[0], (), ())
            self._observe(rms.max(), (scales < 1).sum(), takes_step(optimizer, rms.device), process_group)
            return scales

    def _observe(
        self, highest: Tensor, clipped_tensors: Tensor, steps: Tensor, process_group: dist.ProcessGroup | None
    ) -> None:
        """Record the telemetry of a step, over all ranks of a process group."""
        if process_group is not None:
            clipped_tensors = clipped_tensors.to(highest)
            dist.all_reduce(clipped_tensors, group=process_group)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=process_group)
        telemetry = {
            "update_rms": highest,
            "lowest_update_scale": torch.where(highest > 1 + ROUNDING, 1 / highest, 1.0),
            "update_clipped": clipped_tensors > 0,
            "update_clipped_tensors": clipped_tensors,
        }
        finite = highest.isfinite()
        counts = finite & (highest > 0) & steps
        self._record(telemetry, {}, counts=counts, finite=finite, clipped=clipped_tensors > 0)
