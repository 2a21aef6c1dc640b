"""Every strategy of the library, for the tests that hold for all of them."""

from collections.abc import Callable

import zclip
from zclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClippingStrategy,
    FixedNorm,
    GlobalAdaGC,
    GradientStabilizer,
    LaggedZScore,
    LogZScore,
    NoClipping,
    SkipStep,
    TensorAutoClip,
    ZClip,
)

#: The public classes.
CLASSES: list[type[ClippingStrategy]] = [
    member
    for member in map(vars(zclip).get, zclip.__all__)
    if isinstance(member, type) and issubclass(member, ClippingStrategy) and member is not ClippingStrategy
]

#: Each with arguments with which a run of a few steps leaves the warm-up, and fills windows.
SHORT: dict[str, Callable[[], ClippingStrategy]] = {
    "none": NoClipping,
    "fixed": lambda: FixedNorm(0.5),
    "autoclip": lambda: AutoClip(percentile=30),
    "autoclip-window": lambda: AutoClip(percentile=30, window=4),
    "tensor-autoclip": lambda: TensorAutoClip(percentile=30, window=4),
    "zclip": lambda: ZClip(warmup_steps=4),
    "zclip-mean": lambda: ZClip(warmup_steps=4, clip_option="mean", max_grad_norm=1.0),
    "zclip-max": lambda: ZClip(warmup_steps=4, clip_option="max"),
    "zclip-without-recovery": lambda: ZClip(warmup_steps=2, recovery_window=None),
    "log-z-score": lambda: LogZScore(warmup_steps=3, z_thresh=1.5),
    "lagged-z-score": lambda: LaggedZScore(z_thresh=1.0, lag=2, window=4, warmup_steps=4),
    "adagc": lambda: AdaGC(warmup_steps=2),
    "adagc-recovery": lambda: AdaGC(warmup_steps=2, recovery_window=8),
    "global-adagc": lambda: GlobalAdaGC(warmup_steps=2, recovery_window=8),
    "stabilizer": GradientStabilizer,
    "skip-step": lambda: SkipStep(sigma=2.0, window=6),
    "agc": AGC,
}
#: Those that can decide by a norm alone.
OF_NORMS = {name: make for name, make in SHORT.items() if not make().needs_gradients}
