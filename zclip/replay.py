"""Replay the gradient norms of a finished run: which steps would a strategy have clipped?

    python -m zclip replay FILE [KEY=VALUE[,VALUE...] ...]

    FILE    a run's metrics.jsonl, or a CSV with a column of norms, such as a wandb export
    clip    zclip, log_z_score, lagged_z_score, fixed, autoclip, global_adagc, skip_step, none, or
            module.Class of your own; default zclip
    KEY     argument of the strategy; every combination of the values is replayed.
            Defaults are those of the class: max_grad_norm is off.
    column  name of the column of norms; default grad_norm
    loss    name of the column of losses, for skip_step; default loss, if the file has it
    out     file of the plot, or none; default replay.png. The plot needs matplotlib.

Rows without a norm are skipped. NaN, inf, and null in JSON lines, are norms that were not finite.
The norms are those that the run recorded: if an early step had been clipped differently, the later
norms would differ.

    python -m zclip replay metrics.jsonl z_thresh=2,2.5,3
    python -m zclip replay metrics.jsonl clip=fixed max_norm=0.5,1 out=none
"""

import ast
import importlib
import io
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
from zclip.trace import NormTrace, ReplayResult, printable, read_trace

STRATEGIES: dict[str, type[ClippingStrategy]] = {
    "zclip": ZClip,
    "log_z_score": LogZScore,
    "lagged_z_score": LaggedZScore,
    "fixed": FixedNorm,
    "autoclip": AutoClip,
    "global_adagc": GlobalAdaGC,
    "skip_step": SkipStep,
    "none": NoClipping,
}
#: Those that need the norm of each tensor, or the gradients, which a file has not.
OF_TENSORS: dict[str, type[ClippingStrategy]] = {
    "adagc": AdaGC,
    "agc": AGC,
    "gradient_stabilizer": GradientStabilizer,
    "tensor_autoclip": TensorAutoClip,
}

#: The plot has a panel for each combination.
MAX_COMBINATIONS = 50


def replay(
    strategy: ClippingStrategy, norms: Sequence[float], losses: Sequence[float] | None, label: str
) -> ReplayResult:
    """Replay the norms of a run through a strategy that has not taken a step; NaN is a norm that was not finite.

    The strategy's `max_consecutive_nonfinite` is set to `None`. If its `on_nonfinite` is "raise", such a norm raises
    `FloatingPointError`. A strategy with a scope raises `ValueError`.
    """
    if strategy.scope is not None:
        raise ValueError(f"scope={strategy.scope} cannot be replayed: a file has the norm of all parameters only")
    strategy.max_consecutive_nonfinite = None
    clipped_norms, consecutive, max_consecutive = [], 0, 0
    for i, norm in enumerate(norms):
        loss = None if losses is None or not strategy.uses_loss else torch.tensor(losses[i], device="cpu")
        strategy.observe(torch.tensor(norm, dtype=torch.float64, device="cpu"), loss)
        clipped_norms.append(strategy.read_telemetry()["clipped_norm"])
        consecutive = consecutive + 1 if clipped_norms[-1] < norm else 0
        max_consecutive = max(max_consecutive, consecutive)
    return ReplayResult(label, list(norms), clipped_norms, max_consecutive)


def parse_args(arguments: Sequence[str]) -> dict[str, str]:
    """Return `KEY=VALUE` arguments by their keys.

    Raises:
        ValueError: an argument is not `KEY=VALUE`, or a key is repeated.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"{argument} is not KEY=VALUE; the file comes first")
        if key in values:
            raise ValueError(f"{argument} is the second value of {key}: give several as {key}=VALUE,VALUE")
        values[key] = value
    return values


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
        return text


def _strategy_class(name: str) -> type[ClippingStrategy]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, _, attribute = name.rpartition(".")
    try:
        strategy_class = OF_TENSORS.get(name) or getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may raise anything on import
        allowed = f"it must be one of {', '.join(STRATEGIES)}, or module.Class"
        reason = f"cannot be imported ({type(error).__name__}: {error})" if module else "is not known"
        raise ValueError(f"clip={name} {reason}: {allowed}") from error
    is_strategy = isinstance(strategy_class, type) and issubclass(strategy_class, ClippingStrategy)
    if (
        not is_strategy
        or strategy_class.per_tensor
        or strategy_class.needs_gradients
        or (strategy_class.decide is ClippingStrategy.decide and strategy_class.clip is ClippingStrategy.clip)
    ):
        raise ValueError(
            f"clip={name} cannot be replayed: it must be a ClippingStrategy over the global norm, because a file has "
            "no other norms"
        )
    return strategy_class


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 after one sentence on stderr."""
    help_requested = any(argument in ("--help", "-h") for argument in arguments)
    if help_requested or len(arguments) < 2 or arguments[0] != "replay":
        print(__doc__, end="", file=sys.stdout if help_requested else sys.stderr)
        return 0 if help_requested else 2
    file = arguments[1]
    try:
        values = parse_args(arguments[2:])
        clip, out = values.pop("clip", "zclip"), values.pop("out", "replay.png")
        trace = read_trace(Path(file), values.pop("column", "grad_norm"), values.pop("loss", None))
        if not trace.norms:
            raise ValueError(f"{file} has no steps")
        choices = {key: [_parse_value(part) for part in value.split(",")] for key, value in values.items()}
        varied = [key for key, several in choices.items() if len(several) > 1]
        count = math.prod(map(len, choices.values()))
        if count > MAX_COMBINATIONS:
            allowed = f"at most {MAX_COMBINATIONS} are replayed at once"
            raise ValueError(f"these are {count:,} combinations of settings: {allowed}")
        combinations = [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]
        strategies = _make_strategies(clip, combinations)
        results = []
        for strategy, combination in zip(strategies, combinations, strict=True):
            label = " ".join(f"{key}={combination[key]}" for key in varied) or clip
            results.append(replay(strategy, trace.norms, trace.losses, label))
    except (ValueError, FloatingPointError) as error:
        return _fail(error)
    common = [f"{key}={value!r}" for key, value in strategies[0].config().items() if key not in varied]
    print(f"{len(trace.norms)} steps of {printable(file, 4096)}, {type(strategies[0]).__name__}({', '.join(common)})")
    _print_table(results)
    return 0 if out == "none" else _plot(results, trace, out)


def _fail(error: object) -> int:
    print(f"zclip replay: error: {printable(str(error), 10_000)}", file=sys.stderr)
    return 2


def run(arguments: Sequence[str]) -> int:
    """Run the command line as a program, whose output may not take every character, or end early (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        return 1
    return status


def _make_strategies(clip: str, combinations: Sequence[dict[str, Any]]) -> list[ClippingStrategy]:
    strategy_class = _strategy_class(clip)
    try:
        return [strategy_class(**combination) for combination in combinations]
    except TypeError as error:
        raise ValueError(f"clip={clip} does not take these settings: {error}") from error


def _print_table(results: Sequence[ReplayResult]) -> None:
    width = max(len("settings"), *(len(result.label) for result in results))
    print(f"{'settings':{width}}  clipped   share  skipped  max in a row  max norm after")
    for result in results:
        pairs = zip(result.norms, result.clipped_norms, strict=True)
        skipped = sum(after == 0 and before != 0 for before, after in pairs)
        clipped = sum(result.clipped)
        print(
            f"{result.label:{width}}  {clipped:7}  {clipped / len(result.norms):6.1%}  {skipped:7}  "
            f"{result.max_consecutive_clips:12}  {max(result.clipped_norms):14.4g}"
        )


def _plot(results: Sequence[ReplayResult], trace: NormTrace, out: str) -> int:
    """Write the plot, if matplotlib is installed; return the exit status."""
    try:
        from zclip.integrations.plot import plot
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return 0
    try:
        plot(results, trace.steps, Path(out))
    except (OSError, ValueError) as error:
        return _fail(f"out={out} cannot be written: {error}")
    print(f"plot: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(["replay", *sys.argv[1:]]))
