"""Muon and AdamW as one optimizer: a run has one, with one schedule, one clipping strategy and one saved state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's `Muon` on matrices and torch's `AdamW` on all other parameters.

    The two parameter groups have the names `Muon` and `AdamW`, by which `scope="group:AdamW"` of a strategy finds
    them. State and groups are those of this optimizer; torch's classes only take the steps.

    Args:
        matrices: 2-D parameters, which Muon trains (arXiv 2502.16982; its update is orthogonalised).
        others: parameters that AdamW trains.
        lr: learning rate of both.
        weight_decay: decoupled weight decay of both.
        momentum, nesterov, ns_steps, adjust_lr_fn: arguments of `torch.optim.Muon`.
        betas, eps, fused: arguments of `torch.optim.AdamW`.

    Raises:
        ValueError: an argument is out of its range, or a matrix is not 2-D.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        muon = Muon(matrices, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)
        adamw = AdamW(others, lr, betas, eps, weight_decay, fused=fused)
        self._parts: dict[str, Optimizer] = {"Muon": muon, "AdamW": adamw}
        groups = [{"name": name, **part.param_groups[0]} for name, part in self._parts.items()]
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with both; return the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():  # loading a state, or a rule over updates, replaces groups and state
            part.param_groups = [group for group in self.param_groups if group["name"] == name]
            part.state = self.state
            part.step()
        return loss
