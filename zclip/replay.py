"""What a strategy would have clipped in a run already done: `python -m zclip replay metrics.jsonl z_thresh=2,2.5,3`.

    python -m zclip replay FILE [clip=zclip] [KEY=VALUE[,VALUE...] ...] [column=grad_norm] [loss=loss] [out=replay.png]

FILE is metrics.jsonl, or a CSV with a column of norms, such as a wandb export. `clip` is zclip, fixed, autoclip, skip
or none, or module.Class of your own; the other keys are its arguments, and every combination of their values is
replayed. The norms are those of the run as it was: a step clipped otherwise would have changed the ones after it.
The picture needs matplotlib; without it, or with out=none, only the table is made.
"""

import ast
import csv
import importlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zclip.base import ClippingStrategy
from zclip.strategies.autoclip import AutoClip
from zclip.strategies.fixed import FixedNorm
from zclip.strategies.none import NoClipping
from zclip.strategies.skip import SkipStep
from zclip.strategies.zclip import ZClip

STRATEGIES: dict[str, type[ClippingStrategy]] = {
    "zclip": ZClip,
    "fixed": FixedNorm,
    "autoclip": AutoClip,
    "skip": SkipStep,
    "none": NoClipping,
}


class Replayed(NamedTuple):
    """What one setting would have done.

    Attributes:
        label: the settings that vary.
        norms: (steps,) before clipping; NaN where the file has none.
        kept: (steps,) after clipping; 0 where the step would have been skipped.
        in_a_row: most consecutive clipped steps.
    """

    label: str
    norms: list[float]
    kept: list[float]
    in_a_row: int

    @property
    def clipped(self) -> list[bool]:
        """Of each step, whether it would have been clipped or skipped."""
        return [kept < norm for norm, kept in zip(self.norms, self.kept, strict=True)]


def read_columns(path: Path, column: str, loss: str) -> tuple[list[float], list[float] | None]:
    """Return the norms of a run, and its losses if the file has them.

    Args:
        path: JSON lines (.jsonl, .json) or CSV with a header.
        column: of the norms. In a CSV it may also be the end of one header, as in a wandb export.
        loss: of the losses, likewise.

    Raises:
        ValueError: the file cannot be read, or has no such column.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".jsonl", ".json"):
            rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path} cannot be read: each line must be an object, such as {{"{column}": 1.5}}')
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))

    def find(wanted: str) -> str | None:
        ends = [name for name in names if name.split(" - ")[-1].strip() == wanted]
        return wanted if wanted in names else ends[0] if len(ends) == 1 else None

    def numbers(name: str) -> list[float]:
        try:
            return [math.nan if row.get(name) in (None, "") else float(row[name]) for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(f"column={name} of {path} holds something that is no number: {error}") from error

    found, found_loss = find(column), find(loss)
    if found is None:
        raise ValueError(f"column={column} is not in {path}: it has {', '.join(names) or 'no columns'}")
    return numbers(found), numbers(found_loss) if found_loss else None


def replay(strategy: ClippingStrategy, norms: Sequence[float], losses: Sequence[float] | None, label: str) -> Replayed:
    """Show a run's norms to a strategy.

    Args:
        strategy: one that has not taken a step yet.
        norms: (steps,) in order; NaN is a norm that was not finite.
        losses: (steps,), for strategies that look at them.
        label: name of the result.
    """
    kept, row, longest = [], 0, 0
    strategy.max_consecutive_nonfinite = None
    for i, norm in enumerate(norms):
        loss = None if losses is None or not strategy.uses_loss else torch.tensor(losses[i])
        strategy.observe(torch.tensor(norm, dtype=torch.float64), loss)
        kept.append(strategy.read_telemetry()["clipped_norm"])
        row = row + 1 if kept[-1] < norm else 0
        longest = max(longest, row)
    return Replayed(label, list(norms), kept, longest)


def settings(arguments: Sequence[str]) -> tuple[dict[str, str], list[dict[str, Any]], list[str]]:
    """Split `key=value` arguments into options, combinations of strategy arguments, and the names that vary.

    Raises:
        ValueError: an argument is not `key=value`.
    """
    options = {"clip": "zclip", "column": "grad_norm", "loss": "loss", "out": "replay.png"}
    values: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"{argument} is not KEY=VALUE")
        if key in options:
            options[key] = value
        else:
            values[key] = [_parse(part) for part in value.split(",")]
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return options, combinations, [key for key, several in values.items() if len(several) > 1]


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _strategy_class(name: str) -> type[ClippingStrategy]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"clip={name} is not known: it must be one of {', '.join(STRATEGIES)}, or module.Class"
        ) from error
    ours = isinstance(found, type) and issubclass(found, ClippingStrategy) and not found.per_tensor
    if not ours or (found.decide is ClippingStrategy.decide and found.clip is ClippingStrategy.clip):
        raise ValueError(f"clip={name} cannot be replayed: it must be a ClippingStrategy over the global norm")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 after one sentence on stderr."""
    if len(arguments) < 2 or arguments[0] != "replay":
        print(__doc__, file=sys.stderr if arguments[:1] not in (["--help"], ["-h"]) else sys.stdout)
        return 0 if arguments[:1] in (["--help"], ["-h"]) else 2
    try:
        options, combinations, varied = settings(arguments[2:])
        norms, losses = read_columns(Path(arguments[1]), options["column"], options["loss"])
        if not norms:
            raise ValueError(f"{arguments[1]} has no steps")
        made_by = _strategy_class(options["clip"])
        made = []
        for combination in combinations:
            try:
                made.append((made_by(**combination), combination))
            except TypeError as error:
                raise ValueError(f"clip={options['clip']} does not take these settings: {error}") from error
        results = []
        for strategy, combination in made:
            label = " ".join(f"{key}={combination[key]}" for key in varied) or options["clip"]
            results.append(replay(strategy, norms, losses, label))
    except ValueError as error:
        print(f"zclip replay: error: {error}", file=sys.stderr)
        return 2
    width = max(len("settings"), *(len(result.label) for result in results))
    print(f"{len(norms)} steps of {arguments[1]}, {made_by.__name__}")
    print(f"{'settings':{width}}  clipped   share  skipped  most in a row  largest kept")
    for result in results:
        skipped = sum(kept == 0 and norm != 0 for norm, kept in zip(result.norms, result.kept, strict=True))
        clipped = sum(result.clipped)
        numbers = (
            f"{clipped:7}  {clipped / len(norms):6.1%}  {skipped:7}  {result.in_a_row:13}  {max(result.kept):12.4g}"
        )
        print(f"{result.label:{width}}  {numbers}")
    if options["out"] != "none":
        try:
            from zclip.integrations.picture import draw
        except ModuleNotFoundError:
            print("no picture: matplotlib is not installed")
        else:
            try:
                draw(results, Path(options["out"]))
            except (OSError, ValueError) as error:
                print(f"zclip replay: error: out={options['out']} cannot be written: {error}", file=sys.stderr)
                return 2
            print(f"picture: {options['out']}")
    return 0
