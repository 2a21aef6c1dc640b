"""Rules over the update of an optimizer: after its preconditioning, before its learning rate."""

from zclip.updates.base import UpdateDecision, UpdateRule
from zclip.updates.brake import UpdateBrake
from zclip.updates.monitor import UpdateMonitor
from zclip.updates.norm import update_norm
from zclip.updates.update_clip import UpdateClip

__all__ = ["UpdateBrake", "UpdateClip", "UpdateDecision", "UpdateMonitor", "UpdateRule", "update_norm"]
