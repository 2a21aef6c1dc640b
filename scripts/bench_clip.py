"""Benchmark of clipping: `python scripts/bench_clip.py [params=100e6] [device=cpu] [rounds=15] [published=FOLDER]`.

It times clip + fused AdamW step on gradients with the shapes of a LLaMA. In each round every method runs once, in one
process. It prints medians, as ratios to two baselines with the same optimizer step: the floor, which computes the norm
and clips nothing, and `torch.nn.utils.clip_grad_norm_`. `published` is a folder that holds the published zclip package
(a folder named `zclip`), which runs with its defaults.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.text import overrides_dict
from zclip import ClippingStrategy, Decision, ZClip

DEFAULTS = {"params": 100e6, "device": "cuda" if torch.cuda.is_available() else "cpu", "rounds": 15, "published": None}


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


def published_step(folder: str, model: nn.Module) -> Callable[[], None]:
    """Return a function that takes one step with the published package, imported from `folder` next to ours."""
    our_modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "zclip"}
    sys.path.insert(0, folder)
    try:
        published = importlib.import_module("zclip").ZClip()
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "zclip"]:
            del sys.modules[name]
        sys.modules.update(our_modules)
    return lambda: published.step(model)


def main() -> None:
    """Run the benchmark and print its table."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    overrides = overrides_dict(sys.argv[1:])
    unknown = overrides.keys() - DEFAULTS.keys()
    if unknown:
        sys.exit(f"bench_clip.py: error: {unknown.pop()} is not a key: there are {', '.join(DEFAULTS)}")
    cfg = DEFAULTS | overrides
    device = torch.device(cfg["device"])
    torch.manual_seed(0)
    model = nn.Module()
    model.weights = nn.ParameterList(torch.randn(s, device=device) * 0.02 for s in llama_shapes(float(cfg["params"])))
    weights = list(model.parameters())
    for p in weights:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    gradients = [p.grad for p in weights]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    zclip, clip_always = ZClip(), ClipAlways()
    methods: dict[str, Callable[[], object]] = {
        "norm pass (the floor)": lambda: torch.nn.utils.get_total_norm(gradients),
        "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(weights, 10 * norm),
        "ZClip, fused, nothing clipped": lambda: zclip.step(model, optimizer=optimizer),
        "fused, every step clipped": lambda: clip_always.step(model, optimizer=optimizer),
        "ZClip, in place, nothing clipped": lambda: zclip.step(model),
    }
    if cfg["published"]:
        methods["published zclip"] = published_step(cfg["published"], model)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in methods}
    for round_number in track(range(int(cfg["rounds"]) + 2), description="rounds", console=Console(stderr=True)):
        for name, clip in methods.items():
            synchronize()
            start = time.perf_counter()
            clip()
            optimizer.step()
            synchronize()
            if round_number >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in times.items()}
    floor, clip_grad_norm = (medians[name] for name in list(methods)[:2])
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(p.numel() for p in weights)
    table = Table(
        title=f"{count / 1e6:.0f}M fp32 parameters, {hardware}, torch {torch.__version__}", title_justify="left"
    )
    for column in ("clip + fused AdamW step", "median ms", "over the floor", "over clip_grad_norm_"):
        table.add_column(column, justify="left" if column[0] == "c" else "right")
    for name, median in medians.items():
        table.add_row(name, f"{1e3 * median:.1f}", f"{median / floor:.3f}", f"{median / clip_grad_norm:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
