"""Measure clipping: `python scripts/bench_clip.py [params=100e6] [tensors=10000] [rounds=15] [published=FOLDER] ...`.

It times clipping and a fused AdamW step, for the gradients of a LLaMA and for thousands of small ones. In one table
nothing is clipped, in another every step is. The methods take turns. It prints medians, as ratios to two baselines with
the same optimizer step: the floor, which computes the norm and clips nothing, and `clip_grad_norm_` of torch.

    python scripts/bench_clip.py rounds=5
    python scripts/bench_clip.py device=cuda params=1e9
"""

import _entry  # first: it finds the checkout and installs the signal handlers

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from common.console import make_console
from common.settings import AtLeastOne, Count, Folder, Settings, parse
from scripts._bench import DEVICE, device_name, median_seconds, numbers_table
from zclip import (
    AGC,
    AdaGC,
    AutoClip,
    ClippingStrategy,
    Decision,
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
from zclip.norm import global_norm, parameters_of, tensor_norms
from zclip.updates import SPAM, OptimizerRule, StableAdamW, UpdateBrake, UpdateClip, UpdateMonitor

#: Elements of a chunk whose scaled gradients stay in the cache of a CPU.
CHUNK = 1 << 16
#: Factor of a step that is clipped slightly, so that the norm decreases slowly.
FACTOR = 0.999

Method = Callable[[], object]
Shapes = Sequence[tuple[int, ...]]


class BenchClipConfig(Settings):
    """Settings of the command line."""

    params: AtLeastOne = 100e6
    """Approximate number of parameters of the LLaMA."""
    tensors: Count = 10_000
    """Number of tensors of the model of small ones."""
    device: Literal["cpu", "cuda"] = DEVICE
    """Device of parameters and gradients."""
    rounds: Count = 15
    """Rounds that are measured."""
    clock: Literal["wall", "cpu"] = "wall"
    """Clock: "cpu" counts the CPU time of all threads, for a busy machine and `OMP_NUM_THREADS=1`."""
    published: Folder | None = None
    """Folder that holds the published zclip package, which runs with its defaults; null: it does not run."""


class ClipAlways(ClippingStrategy):
    """Clip every step to `FACTOR` of its norm."""

    def decide(self, norm: Tensor, state: dict[str, Tensor]) -> Decision:
        """Return a target slightly below the norm."""
        return Decision(FACTOR * norm, state)


class Weight(nn.Module):
    """A module with one parameter and its gradient, as most modules of a language model have one."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, device=device) * 0.02)
        self.weight.grad = torch.randn_like(self.weight) * 1e-3


def llama_shapes(parameters: float) -> list[tuple[int, ...]]:
    """Return the tensor shapes of a LLaMA with 16 layers and about this many parameters."""
    hidden = max(64, round((parameters / (16 * 12)) ** 0.5 / 64) * 64)
    intermediate = 8 * hidden // 3
    feed_forward = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    layer = [(hidden, hidden)] * 4 + feed_forward + [(hidden,)] * 2
    return layer * 16 + [(hidden,)]


def small_shapes(tensors: int) -> list[tuple[int, ...]]:
    """Return the shapes of so many small tensors, half of them vectors."""
    return [(32, 32) if i % 2 else (32,) for i in range(tensors)]


def published_step(folder: str, model: nn.Module) -> Callable[[], object]:
    """Return a function that takes one step with the published package, imported from `folder` next to ours."""
    our_modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "zclip"}
    sys.path.insert(0, folder)
    published = importlib.import_module("zclip").ZClip()
    sys.path.remove(folder)
    sys.modules.update(our_modules)
    return lambda: published.step(model)


def without_last(model: nn.Module) -> str:
    """Return the scope of all parameters but the last one, so that a fused optimizer cannot scale the gradients."""
    *_, (name, _) = model.named_parameters()
    return f"!{name}"


def calm_strategies(norm: float, scope: str) -> dict[str, ClippingStrategy]:
    """Return every strategy of the library, with arguments with which it clips no gradient of this norm.

    `GradientStabilizer` scales all gradients, so it is one of `clipping_methods`.
    """
    bound = 10 * norm
    named: dict[str, ClippingStrategy] = {
        "ZClip": ZClip(),
        "ZClip, all but one tensor": ZClip(scope=scope),
        "FixedNorm": FixedNorm(bound),
        "NoClipping": NoClipping(),
        "AutoClip": AutoClip(percentile=100),
        "LogZScore": LogZScore(),
        "LaggedZScore": LaggedZScore(),
        "SkipStep": SkipStep(window=10_000),
        "GlobalAdaGC": GlobalAdaGC(warmup_steps=1, lambda_abs=bound, lambda_rel=2.0),
        "AdaGC": AdaGC(warmup_steps=1, lambda_abs=bound, lambda_rel=2.0),
        "TensorAutoClip": TensorAutoClip(percentile=100),
        "AGC": AGC(ratio=10.0),
    }
    return named


def update_rules() -> list[OptimizerRule]:
    """Return every rule over updates of the library; none acts in the first steps, if gradients stay the same."""
    return [UpdateMonitor(), UpdateClip(), UpdateBrake(), StableAdamW(), SPAM()]


def calm_methods(model: nn.Module, optimizer: torch.optim.Optimizer, published: str | None) -> dict[str, Method]:
    """Return methods that measure gradients and clip nothing, before the same optimizer step."""
    norm = float(get_norm(model))

    def method(strategy: ClippingStrategy) -> Method:
        return lambda: (strategy.step(model, optimizer=optimizer), optimizer.step())

    def attached(part: ClippingStrategy | OptimizerRule) -> torch.optim.Optimizer:
        """Return an optimizer with a strategy or a rule, which shares the moments to save memory."""
        inner = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        inner.state = optimizer.state
        part.attach(inner, model) if isinstance(part, ClippingStrategy) else part.attach(inner)
        return inner

    def with_rule(rule: OptimizerRule) -> Method:
        inner = attached(rule)
        return lambda: (get_norm(model), inner.step())

    in_place = ZClip()
    methods: dict[str, Method] = {
        **baselines(model, optimizer, 10 * norm),
        "accurate norm": lambda: (accurate_norm(model), optimizer.step()),
        **{name: method(strategy) for name, strategy in calm_strategies(norm, without_last(model)).items()},
        "ZClip, in place": lambda: (in_place.step(model), optimizer.step()),
        "ZClip, attached": attached(ZClip()).step,
        **{f"norm pass, and {type(rule).__name__}": with_rule(rule) for rule in update_rules()},
    }
    if published:
        clip = published_step(published, model)
        methods["published zclip"] = lambda: (clip(), optimizer.step())
    return methods


def clipping_methods(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Method]:
    """Return methods that scale all gradients in every step; the last one gives each a norm of about 1 again."""
    one = torch.ones((), device=next(model.parameters()).device)
    norm = len(list(model.parameters())) ** 0.5

    def scale_of_one(norm_of: Callable[[nn.Module], Tensor]) -> None:
        """Compute the norm, and step as with a GradScaler whose scale is 1: the kernel writes gradients back."""
        norm_of(model)
        setattr(optimizer, "grad_scale", one)  # noqa: B010
        optimizer.step()
        delattr(optimizer, "grad_scale")

    each = [FACTOR * one] * len(list(model.parameters()))
    foreach = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True, capturable=one.is_cuda)
    foreach.state = optimizer.state

    def scale_each() -> None:
        """Compute the norm, and scale each gradient in place by one foreach call: the least that AdaGC has to do."""
        get_norm(model)
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], each)
        optimizer.step()

    def method(strategy: ClippingStrategy, *, fused: bool = True) -> Method:
        return lambda: (strategy.step(model, optimizer=optimizer if fused else None), optimizer.step())

    return {
        **baselines(model, optimizer, 0.4 * norm),
        "norm, and a grad_scale of 1": lambda: scale_of_one(get_norm),
        "accurate norm, and a grad_scale of 1": lambda: scale_of_one(accurate_norm),
        "norm, and a factor for each tensor": scale_each,
        "norm, and AdamW(foreach=True)": lambda: (get_norm(model), foreach.step()),
        "norm, and scaled chunks in the cache": step_on_chunks(model, optimizer),
        "one coefficient, fused": method(ClipAlways()),
        "one coefficient, in place": method(ClipAlways(), fused=False),
        "one coefficient, all but one tensor": method(ClipAlways(scope=without_last(model))),
        "AdaGC": method(AdaGC(warmup_steps=1_000_000, lambda_abs=0.2 * norm)),
        "AGC": method(AGC(ratio=1e-3)),
        "GradientStabilizer": method(GradientStabilizer()),
    }


def step_on_chunks(model: nn.Module, optimizer: torch.optim.Optimizer) -> Method:
    """Return a method that gives torch's fused kernel scaled copies of gradients, in chunks that stay in the cache.

    No gradient is written back. The steps are not counted.
    """

    def chunks() -> list[tuple[list[Tensor], ...]]:
        """Return lists of weights, gradients, moments and steps, of at most `CHUNK` elements together."""
        lists: list[tuple[list[Tensor], ...]] = []
        elements = CHUNK
        for p in model.parameters():
            state = optimizer.state[p]
            assert p.grad is not None
            tensors = (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])
            whole = [tensor.view(-1).split(CHUNK) for tensor in tensors]
            for row in zip(*whole, strict=True):
                if elements + row[0].numel() > CHUNK:
                    lists.append(([], [], [], [], []))
                    elements = 0
                for column, part in zip(lists[-1], (*row, state["step"]), strict=True):
                    column.append(part)
                elements += row[0].numel()
        return lists

    found: list[tuple[list[Tensor], ...]] = []

    def step() -> None:
        get_norm(model)
        if not found:  # the moments begin in the first step of the optimizer
            found.extend(chunks())
        for weights, gradients, first, second, steps in found:
            torch._fused_adamw_(
                weights, list(torch._foreach_mul(gradients, FACTOR)), first, second, [], steps,
                lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

    return step


def get_norm(model: nn.Module) -> torch.Tensor:
    """Return the norm of all gradients, by torch."""
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def accurate_norm(model: nn.Module) -> torch.Tensor:
    """Return the norm of all gradients as every strategy measures it, with relative errors below 1e-6 on a CPU."""
    shards = parameters_of(model)
    return global_norm(tensor_norms(shards, [shard.parameter.grad for shard in shards]), None)


def baselines(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> dict[str, Method]:
    """Return the floor, and clipping by torch."""

    def norm_only() -> None:
        get_norm(model)
        optimizer.step()

    return {
        "norm pass (the floor)": norm_only,
        "clip_grad_norm_": lambda: (clip_grad_norm_(model.parameters(), max_norm), optimizer.step()),
    }


def measure(config: BenchClipConfig, shapes: Shapes, clipping: bool) -> tuple[int, dict[str, float]]:
    """Return the number of parameters, and the median seconds of each method: first the floor and torch's."""
    torch.manual_seed(0)
    model = nn.ModuleList(Weight(shape, config.device) for shape in shapes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    methods = clipping_methods(model, optimizer) if clipping else calm_methods(model, optimizer, config.published)
    medians = median_seconds(methods, config.rounds, "rounds", 2, config.clock == "cpu")
    return sum(p.numel() for p in model.parameters()), medians


def main(values: _entry.Values) -> None:
    """Run the benchmark and print its tables."""
    config = parse(BenchClipConfig, values)
    for shapes in (llama_shapes(config.params), small_shapes(config.tensors)):
        for clipping in (False, True):
            count, medians = measure(config, shapes, clipping)
            print_table(config, len(shapes), count, clipping, medians)


def print_table(config: BenchClipConfig, tensors: int, count: int, clipping: bool, medians: dict[str, float]) -> None:
    """Print the medians of one model, in milliseconds and as ratios."""
    floor, clip_grad_norm = list(medians.values())[:2]
    what = "every step is clipped" if clipping else "nothing is clipped"
    model = f"{count / 1e6:.1f}M fp32 parameters in {tensors:,} tensors"
    title = f"{model}, {what}; {device_name(config.device)}, torch {torch.__version__}"
    table = numbers_table(
        title, "clip + fused AdamW step", f"median {config.clock} ms", "over the floor", "over clip_grad_norm_"
    )
    for name, median in medians.items():
        table.add_row(name, f"{1e3 * median:.1f}", f"{median / floor:.3f}", f"{median / clip_grad_norm:.3f}")
    make_console(soft_wrap=False, width=100).print(table)


if __name__ == "__main__":
    _entry.run(main)
