"""Rules over the update of an optimizer: after its preconditioning, before its learning rate."""

from zclip.updates.base import OptimizerRule, UpdateDecision, UpdateRule
from zclip.updates.brake import UpdateBrake
from zclip.updates.monitor import UpdateMonitor
from zclip.updates.norm import update_norm
from zclip.updates.rms import update_rms
from zclip.updates.spam import SPAM
from zclip.updates.stable_adamw import StableAdamW
from zclip.updates.update_clip import UpdateClip

__all__ = [
    "SPAM",
    "OptimizerRule",
    "StableAdamW",
    "UpdateBrake",
    "UpdateClip",
    "UpdateDecision",
    "UpdateMonitor",
    "UpdateRule",
    "update_norm",
    "update_rms",
]
