"""Clipping and a fused AdamW step on the gradients of the paper's 1.07B parameters, as ratios to the floor."""

from typing import Any

from scripts._bench import DEVICE
from scripts.bench_clip import BenchClipConfig, llama_shapes, measure
from scripts.gpu_stages.context import Context


def run(context: Context) -> None:
    """Save the median milliseconds of each method, where nothing is clipped and where every step is."""
    folder = context.carried / "published"
    published = str(folder) if folder.is_dir() else None
    params, rounds = (1e5, 1) if context.dry_run else (1.07e9, 15)
    config = BenchClipConfig(params=params, rounds=rounds, device=DEVICE, published=published)
    context.save(**_results(config, clipping=False))
    context.save(every_step_clipped=_results(config, clipping=True))


def _results(config: BenchClipConfig, clipping: bool) -> dict[str, Any]:
    count, medians = measure(config, llama_shapes(config.params), clipping)
    floor, clip_grad_norm = list(medians.values())[:2]
    return {
        "parameters": count,
        "milliseconds": {name: round(1e3 * seconds, 3) for name, seconds in medians.items()},
        "over_floor": {name: round(seconds / floor, 4) for name, seconds in medians.items()},
        "over_clip_grad_norm": {name: round(seconds / clip_grad_norm, 4) for name, seconds in medians.items()},
    }
