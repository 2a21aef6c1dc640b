"""Clipping and a fused AdamW step on the gradients of the paper's 1.07B parameters, as ratios to the floor."""

from scripts._bench import DEVICE
from scripts.bench_clip import BenchClipConfig, measure
from scripts.gpu_stages.context import Context


def run(context: Context) -> None:
    """Save the median milliseconds of each method."""
    folder = context.carried / "published"
    published = str(folder) if folder.is_dir() else None
    params, rounds = (1e5, 1) if context.dry_run else (1.07e9, 15)
    config = BenchClipConfig(params=params, rounds=rounds, device=DEVICE, published=published)
    count, medians = measure(config)
    floor, clip_grad_norm = list(medians.values())[:2]
    context.save(
        parameters=count,
        milliseconds={name: round(1e3 * seconds, 3) for name, seconds in medians.items()},
        over_floor={name: round(seconds / floor, 4) for name, seconds in medians.items()},
        over_clip_grad_norm={name: round(seconds / clip_grad_norm, 4) for name, seconds in medians.items()},
    )
