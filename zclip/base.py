"""What every clipping strategy shares, so that a strategy is nothing but its rule.

A strategy decides from a norm and its own statistics, both tensors, how large the norm may be
(`ClippingStrategy.decide`). The base class does the rest: it measures the norm (`zclip.norm`), turns the
decision into one coefficient, keeps non-finite norms out of the statistics, scales the gradients
(`zclip.scale`), saves and restores state, and holds the last step's telemetry. `decide` is a pure function of
tensors: statistics come in as a dict and go out as a new one, so the base can drop an update by
`torch.where` instead of by asking the host.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zclip.norm import global_norm
from zclip.scale import scale_

State = dict[str, Tensor]
Parameters = nn.Module | Tensor | Iterable["Parameters"]


class Decision(NamedTuple):
    """What a strategy answers to one norm.

    Attributes:
        target: 0-dim tensor, the norm the gradients may keep; `inf` where the strategy does not clip.
        state: the statistics after this step, with the keys of the state that came in.
        telemetry: 0-dim tensors worth recording, by name.
    """

    target: Tensor
    state: State
    telemetry: Mapping[str, Tensor] = MappingProxyType({})


class ClippingStrategy(ABC):
    """Base of all strategies: a subclass implements `decide`, and `initial_state` if it keeps statistics.

    The arguments of a subclass's `__init__` must be kept as attributes of the same names: `state_dict`
    records them.

    Args:
        max_grad_norm: upper bound on the norm after clipping, whatever the strategy decides. `None`: no bound.
    """

    #: Version of the saved state's layout.
    version = 1

    def __init__(self, max_grad_norm: float | None = None) -> None:
        if max_grad_norm is not None:
            allowed = "a number above 0, or null for no bound"
            require(is_number(max_grad_norm) and max_grad_norm > 0, "max_grad_norm", max_grad_norm, allowed)
        self.max_grad_norm = max_grad_norm
        self.state: State = {}
        #: 0-dim tensors of the last step, on the gradients' device: reading one waits for the device.
        #: Always `grad_norm`, `clipped_norm`, `coefficient` and `clipped` (1 or 0); the rest is the strategy's own.
        self.telemetry: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def decide(self, norm: Tensor, state: State) -> Decision:
        """Return the norm the gradients may keep and the statistics after this step.

        Args:
            norm: 0-dim float tensor, the gradient norm before clipping, finite.
            state: the statistics before this step; not to be changed in place.
        """

    def initial_state(self, like: Tensor) -> State:
        """Return the statistics before the first step, on the device and in the dtype of `like`, a 0-dim zero."""
        return {}

    @torch.no_grad()
    def step(self, *models: Parameters) -> Tensor:
        """Clip the gradients in place. Call it after backward and before the optimizer.

        Args:
            models: modules, parameters, or iterables of either; one norm is taken over all of them.

        Returns:
            The norm before clipping, a 0-dim tensor on the gradients' device.

        Raises:
            ValueError: no parameter has a gradient.
        """
        gradients = [p.grad for p in parameters_of(models) if p.grad is not None]
        if not gradients:
            raise ValueError(
                "no parameter has a gradient: call step() after loss.backward() and before optimizer.zero_grad()"
            )
        norm = global_norm(gradients)
        scale_(gradients, self.observe(norm))
        return norm

    @torch.no_grad()
    def observe(self, norm: Tensor) -> Tensor:
        """Take one norm into the statistics and return the coefficient that clips it.

        A norm that is NaN or infinite leaves the statistics as they were and gets the coefficient 0.

        Args:
            norm: 0-dim tensor.

        Returns:
            0-dim tensor in [0, 1] by which gradients of this norm are to be multiplied.
        """
        norm = norm.detach().to(torch.float32 if norm.device.type == "mps" else torch.float64)
        state = self._state_for(norm)
        finite = torch.isfinite(norm)
        decision = self.decide(torch.where(finite, norm, 1.0), state)
        target = decision.target
        if self.max_grad_norm is not None:
            target = target.clamp(max=self.max_grad_norm)
        clipped = norm > target
        coefficient = torch.where(clipped, target / (norm + 1e-6), 1.0)
        coefficient = torch.where(finite, coefficient, 0.0)
        for key, new in decision.state.items():
            state[key].copy_(torch.where(finite, new, state[key]))
        self.telemetry = {
            "grad_norm": norm,
            "clipped_norm": torch.where(finite, norm * coefficient, 0.0),
            "coefficient": coefficient,
            "clipped": (coefficient < 1).to(norm.dtype),
            **decision.telemetry,
        }
        return coefficient

    def _state_for(self, norm: Tensor) -> State:
        if not self.state:
            self.state = self.initial_state(torch.zeros_like(norm))
        elif any(value.device != norm.device for value in self.state.values()):
            self.state = {key: value.to(norm.device) for key, value in self.state.items()}
        return self.state

    def config(self) -> dict[str, Any]:
        """Return the arguments this strategy was made with, by name."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name != "self"}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decisions depend on: name, version, arguments and statistics."""
        return {
            "strategy": type(self).__name__,
            "version": self.version,
            "config": self.config(),
            "state": {key: value.clone() for key, value in self.state.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            ValueError: the state is of another strategy, version, or set of arguments.
        """
        saved = (state_dict["strategy"], state_dict["version"])
        if saved != (type(self).__name__, self.version):
            raise ValueError(
                f"state of {saved[0]} (version {saved[1]}) cannot be loaded into "
                f"{type(self).__name__} (version {self.version})"
            )
        ours, theirs = self.config(), state_dict["config"]
        changed = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        if changed:
            pairs = ", ".join(f"{key}={theirs.get(key)!r}, not {ours.get(key)!r}" for key in sorted(changed))
            raise ValueError(f"the saved {saved[0]} was made with {pairs}: make this one with the same arguments")
        self.state = {key: value.clone() for key, value in state_dict["state"].items()}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.config().items())
        return f"{type(self).__name__}({arguments})"


def parameters_of(models: Parameters) -> list[Tensor]:
    """Return the distinct parameters of modules, tensors and (nested) iterables of them, in order."""
    found: dict[int, Tensor] = {}

    def visit(item: Parameters) -> None:
        if isinstance(item, Tensor):
            found.setdefault(id(item), item)
        else:
            for inner in item.parameters() if isinstance(item, nn.Module) else item:
                visit(inner)

    visit(models)
    return list(found.values())


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ValueError` naming the argument, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")
