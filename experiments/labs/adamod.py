"""AdaMod: Adam whose rate of each element is bounded by its own running mean. It is a control of the Adam-lag lab."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.errors import ConfigError


class AdaMod(Optimizer):
    """AdaMod (Ding et al., arXiv 1910.12249) with decoupled weight decay.

    With the moments of Adam, corrected for their bias, each element has a rate of its own, and its running mean s
    bounds it::

        eta_t = lr / (sqrt(v_t) + eps)
        s_t   = beta3 * s_{t-1} + (1 - beta3) * eta_t        s_0 = 0
        p_t   = p_{t-1} - min(eta_t, s_t) * m_t

    s is not corrected for its bias, so that the rates also warm up over about `1 / (1 - beta3)` steps. It holds the
    learning rate of the schedule. The decay is AdamW's, `p <- (1 - lr * weight_decay) * p`, and no part of m and v.

    Args:
        params: parameters, or groups of them.
        lr: learning rate. Default 1e-3.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        beta3: decay rate of s, the paper's. Default 0.999: a memory of about 1,000 steps.
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decoupled weight decay. Default 0.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError("betas", betas, "two numbers from 0 to below 1")
        if not 0 <= beta3 < 1:
            raise ConfigError("beta3", beta3, "a number from 0 to below 1")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ConfigError(name, value, "a number from 0")
        defaults = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; return the loss of the closure, if there is one. A parameter without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq", "mean_rate")}
        (beta1, beta2), lr = group["betas"], group["lr"]
        moment, square, mean_rate = state["exp_avg"], state["exp_avg_sq"], state["mean_rate"]
        state["step"] += 1
        step = float(state["step"])
        moment.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = (square / (1 - beta2**step)).sqrt_().add_(group["eps"]).reciprocal_().mul_(lr)
        mean_rate.lerp_(rate, 1 - group["beta3"])
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcmul_(torch.minimum(rate, mean_rate), moment, value=-1 / (1 - beta1**step))
