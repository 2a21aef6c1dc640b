"""The module name under which the published zclip offers its Lightning callback."""

from zclip.integrations.lightning import ZClipLightningCallback

__all__ = ["ZClipLightningCallback"]
