"""ZClip: adaptive gradient clipping for pre-training language models (arXiv 2504.02507).

    from zclip import ZClip

    zclip = ZClip()
    loss.backward()
    zclip.step(model)      # after backward, before the optimizer
    optimizer.step()

`ZClip` is the paper's clipper; `FixedNorm`, `AutoClip` and `NoClipping` are what it is compared with.
All are `ClippingStrategy` subclasses, and so is any strategy of your own. Only torch is imported here;
`ZClipLightningCallback` and `ClippingCallback` load Lightning, `TrainerClippingCallback` Hugging Face's transformers,
when they are first asked for.
"""

from importlib import import_module
from typing import Any

from zclip.base import Clipping, ClippingStrategy, Decision, Measured, State
from zclip.strategies.adagc import AdaGC
from zclip.strategies.agc import AGC
from zclip.strategies.autoclip import AutoClip
from zclip.strategies.fixed import FixedNorm
from zclip.strategies.none import NoClipping
from zclip.strategies.skip import SkipStep
from zclip.strategies.stabilizer import GradientStabilizer
from zclip.strategies.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Clipping",
    "ClippingStrategy",
    "Decision",
    "FixedNorm",
    "GradientStabilizer",
    "Measured",
    "NoClipping",
    "SkipStep",
    "State",
    "ZClip",
]

#: What needs more than torch: the module it is in, and what that needs.
_INTEGRATIONS = {
    "ClippingCallback": ("lightning", "lightning"),
    "ZClipLightningCallback": ("lightning", "lightning"),
    "TrainerClippingCallback": ("transformers", "'transformers[torch]'"),
}


def __getattr__(name: str) -> Any:
    if name not in _INTEGRATIONS:
        raise AttributeError(f"module 'zclip' has no attribute {name!r}")
    module, needs = _INTEGRATIONS[name]
    try:
        return getattr(import_module(f"zclip.integrations.{module}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"zclip.{name} needs {module}: pip install {needs}", name=error.name) from error
