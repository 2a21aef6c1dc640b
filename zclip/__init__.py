"""ZClip: adaptive gradient clipping for pre-training language models (arXiv 2504.02507).

    from zclip import ZClip

    zclip = ZClip()
    zclip.attach(optimizer)  # every optimizer.step() now clips first; or, where the loop clips:
    zclip.step(model)        # after backward, before the optimizer

`ZClip` is the strategy of the paper, and the other strategies are baselines. All are subclasses of `ClippingStrategy`,
as your own strategy can be. `zclip.updates` has rules over the update of an optimizer. Importing this package imports
torch only. `zclip.updates` is imported on first access. So are `ZClipLightningCallback` and `ClippingCallback`, which
import Lightning, and `TrainerClippingCallback`, which imports Hugging Face's transformers.
"""

from importlib import import_module
from typing import Any

from zclip.base import ClippingStrategy
from zclip.decision import ClipResult, Decision, GradStats, State
from zclip.strategies.adagc import AdaGC, GlobalAdaGC
from zclip.strategies.agc import AGC
from zclip.strategies.autoclip import AutoClip
from zclip.strategies.fixed_norm import FixedNorm, NoClipping
from zclip.strategies.gradient_stabilizer import GradientStabilizer
from zclip.strategies.lagged_z_score import LaggedZScore
from zclip.strategies.log_z_score import LogZScore
from zclip.strategies.skip_step import SkipStep
from zclip.strategies.tensor_autoclip import TensorAutoClip
from zclip.strategies.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipResult",
    "ClippingStrategy",
    "Decision",
    "FixedNorm",
    "GlobalAdaGC",
    "GradStats",
    "GradientStabilizer",
    "LaggedZScore",
    "LogZScore",
    "NoClipping",
    "SkipStep",
    "State",
    "TensorAutoClip",
    "ZClip",
]

#: Names that need more than torch: their module in `zclip.integrations`, and the requirement to install.
_INTEGRATIONS = {
    "ClippingCallback": ("lightning", "lightning"),
    "ZClipLightningCallback": ("lightning", "lightning"),
    "TrainerClippingCallback": ("transformers", "'transformers[torch]'"),
}


def __getattr__(name: str) -> Any:
    if name == "updates":
        return import_module("zclip.updates")
    if name not in _INTEGRATIONS:
        raise AttributeError(f"module 'zclip' has no attribute {name!r}")
    module, requirement = _INTEGRATIONS[name]
    try:
        return getattr(import_module(f"zclip.integrations.{module}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"zclip.{name} needs {module}: pip install {requirement}", name=error.name) from error
