"""Module under which the published zclip package offers its Lightning callback."""

from zclip.integrations.lightning import ZClipLightningCallback

__all__ = ["ZClipLightningCallback"]
