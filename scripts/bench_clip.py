"""Measure clipping: `python scripts/bench_clip.py [params=100e6] [device=cpu] [rounds=15] [published=FOLDER]`.

It times clip + fused AdamW step on gradients with the shapes of a LLaMA. It prints medians, as ratios to two baselines
with the same optimizer step: the floor, which computes the norm and clips nothing, and `clip_grad_norm_` of torch.

    python scripts/bench_clip.py rounds=5
    python scripts/bench_clip.py device=cuda params=1e9
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import importlib
import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from common.console import make_console
from common.settings import AtLeastOne, Count, Folder, Settings, parse
from scripts._bench import DEVICE, device_name, median_seconds, numbers_table
from zclip import ClippingStrategy, Decision, ZClip
from zclip.updates import update_norm


class BenchClipConfig(Settings):
    """Settings of the command line."""

    params: AtLeastOne = 100e6
    """Approximate number of parameters."""
    device: Literal["cpu", "cuda"] = DEVICE
    """Device of parameters and gradients."""
    rounds: Count = 15
    """Rounds that are measured."""
    published: Folder | None = None
    """Folder that holds the published zclip package, which runs with its defaults; null: it does not run."""


class ClipAlways(ClippingStrategy):
    """Clip every step slightly: the fused optimizer writes scaled gradients back, so the norm decreases slowly."""

    def decide(self, norm: torch.Tensor, state: dict[str, torch.Tensor]) -> Decision:
        """Return 0.999 of the norm as the target."""
        return Decision(0.999 * norm, state)


def llama_shapes(parameters: float) -> list[tuple[int, ...]]:
    """Return the tensor shapes of a LLaMA with 16 layers and about this many parameters."""
    hidden = max(64, round((parameters / (16 * 12)) ** 0.5 / 64) * 64)
    intermediate = 8 * hidden // 3
    feed_forward = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    layer = [(hidden, hidden)] * 4 + feed_forward + [(hidden,)] * 2
    return layer * 16 + [(hidden,)]


def published_step(folder: str, model: nn.Module) -> Callable[[], object]:
    """Return a function that takes one step with the published package, imported from `folder` next to ours."""
    our_modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "zclip"}
    sys.path.insert(0, folder)
    published = importlib.import_module("zclip").ZClip()
    sys.path.remove(folder)
    sys.modules.update(our_modules)
    return lambda: published.step(model)


def measure(config: BenchClipConfig) -> tuple[int, dict[str, float]]:
    """Return the number of parameters, and the median seconds of each method: first the floor and torch's."""
    torch.manual_seed(0)
    shapes = llama_shapes(config.params)
    model = nn.Module()
    model.weights = nn.ParameterList(torch.randn(shape, device=config.device) * 0.02 for shape in shapes)
    weights = list(model.parameters())
    for p in weights:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    gradients = [p.grad for p in weights if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    zclip, clip_always = ZClip(), ClipAlways()
    methods: dict[str, Callable[[], object]] = {
        "norm pass (the floor)": lambda: torch.nn.utils.get_total_norm(gradients),
        "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(weights, 10 * norm),
        "ZClip, fused, nothing clipped": lambda: zclip.step(model, optimizer=optimizer),
        "fused, every step clipped": lambda: clip_always.step(model, optimizer=optimizer),
        "ZClip, in place, nothing clipped": lambda: zclip.step(model),
        "norm pass, and the norm of the update": lambda: (
            torch.nn.utils.get_total_norm(gradients),
            update_norm(optimizer),
        ),
    }
    if config.published:
        methods["published zclip"] = published_step(config.published, model)

    def with_step(clip: Callable[[], object]) -> Callable[[], object]:
        return lambda: (clip(), optimizer.step())

    medians = median_seconds({name: with_step(clip) for name, clip in methods.items()}, config.rounds, "rounds", 2)
    return sum(p.numel() for p in weights), medians


def main(values: _entry.Values) -> None:
    """Run the benchmark and print its table."""
    config = parse(BenchClipConfig, values)
    count, medians = measure(config)
    floor, clip_grad_norm = list(medians.values())[:2]
    title = f"{count / 1e6:.0f}M fp32 parameters, {device_name(config.device)}, torch {torch.__version__}"
    table = numbers_table(title, "clip + fused AdamW step", "median ms", "over the floor", "over clip_grad_norm_")
    for name, median in medians.items():
        table.add_row(name, f"{1e3 * median:.1f}", f"{median / floor:.3f}", f"{median / clip_grad_norm:.3f}")
    make_console(soft_wrap=False, width=100).print(table)


if __name__ == "__main__":
    _entry.run(main)
