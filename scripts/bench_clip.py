"""What clipping costs: `python scripts/bench_clip.py [params=100e6] [device=cpu] [rounds=15] [published=FOLDER]`.

Times clip + fused AdamW step over one set of gradients shaped like a LLaMA's, contenders taking turns in one process,
and prints medians as ratios: to the floor (the norm pass and the same optimizer step, nothing clipped) and to
`torch.nn.utils.clip_grad_norm_` + the same optimizer step. `published` is a folder that holds the published zclip
package (a folder named `zclip`); it runs with its defaults.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from zclip import ClippingStrategy, Decision, ZClip

DEFAULTS = {"params": 100e6, "device": "cuda" if torch.cuda.is_available() else "cpu", "rounds": 15, "published": None}


class Always(ClippingStrategy):
    """Clip every step by a little: the fused optimizer writes scaled gradients back, so the norm sinks slowly."""

    def decide(self, norm: torch.Tensor, state: dict[str, torch.Tensor]) -> Decision:
        """Allow 0.999 of the norm."""
        return Decision(0.999 * norm, state)


def llama_shapes(parameters: float) -> list[tuple[int, ...]]:
    """Shapes of a LLaMA of about this many parameters: 16 layers, half as wide again in the feed-forward."""
    hidden = max(64, round((parameters / (16 * 12)) ** 0.5 / 64) * 64)
    wide = 8 * hidden // 3
    layer = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide), (hidden,), (hidden,)]
    return layer * 16 + [(hidden,)]


def published_step(folder: str, model: nn.Module) -> Callable[[], None]:
    """Return one step of the published implementation, loaded from `folder` beside ours."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "zclip"}
    sys.path.insert(0, folder)
    try:
        theirs = importlib.import_module("zclip").ZClip()
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "zclip"]:
            del sys.modules[name]
        sys.modules.update(ours)
    return lambda: theirs.step(model)


def main() -> None:
    """Run the benchmark and print its table."""
    given = OmegaConf.to_container(OmegaConf.from_cli())
    unknown = given.keys() - DEFAULTS.keys()
    if unknown:
        sys.exit(f"bench_clip.py: error: {unknown.pop()} is not a key: there are {', '.join(DEFAULTS)}")
    cfg = DEFAULTS | given
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
    zclip, always = ZClip(), Always()
    fold = {"optimizer": optimizer}
    contenders: dict[str, Callable[[], object]] = {
        "norm pass (the floor)": lambda: torch.nn.utils.get_total_norm(gradients),
        "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(weights, 10 * norm),
        "ZClip, folded, nothing clipped": lambda: zclip.step(model, **fold),
        "folded, every step clipped": lambda: always.step(model, **fold),
        "ZClip, in place, nothing clipped": lambda: zclip.step(model),
    }
    if cfg["published"]:
        contenders["published zclip"] = published_step(cfg["published"], model)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in track(range(int(cfg["rounds"]) + 2), description="rounds", console=Console(stderr=True)):
        for name, clip in contenders.items():
            synchronize()
            start = time.perf_counter()
            clip()
            optimizer.step()
            synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in times.items()}
    floor, peer = (medians[name] for name in list(contenders)[:2])
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(p.numel() for p in weights)
    table = Table(title=f"{count / 1e6:.0f}M fp32 parameters, {place}, torch {torch.__version__}", title_justify="left")
    for column in ("clip + fused AdamW step", "median ms", "over the floor", "over clip_grad_norm_"):
        table.add_column(column, justify="left" if column[0] == "c" else "right")
    for name, median in medians.items():
        table.add_row(name, f"{1e3 * median:.1f}", f"{median / floor:.3f}", f"{median / peer:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
