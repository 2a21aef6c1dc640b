"""What a strategy would have clipped in a run already done: `python -m zclip replay metrics.jsonl z_thresh=2,2.5,3`.

    python -m zclip replay FILE [clip=zclip] [KEY=VALUE[,VALUE...] ...] [column=grad_norm] [loss=loss] [out=replay.png]

FILE is metrics.jsonl, or a CSV with a column of norms, such as a wandb export. `clip` is zclip, fixed, autoclip, skip
or none, or module.Class of your own; the other keys are its arguments, with the defaults of the class (max_grad_norm
is off), and every combination of their values is replayed. Rows without a norm are left out; null in JSON lines, and
NaN or inf, are norms that were not finite. The norms are those of the run as it was: a step clipped otherwise would
have changed the ones after it. The picture needs matplotlib; without it, or with out=none, only the table is made.
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


#: A picture has a panel for each.
MOST_SETTINGS = 50


class Replayed(NamedTuple):
    """What one setting would have done.

    Attributes:
        label: the settings that vary.
        norms: (steps,) before clipping; NaN where they were not finite.
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


class Recorded(NamedTuple):
    """What a file has of a run.

    Attributes:
        steps: (steps,) their numbers.
        norms: (steps,) before clipping; NaN where they were not finite.
        losses: (steps,), `None` if the file has none.
    """

    steps: list[float]
    norms: list[float]
    losses: list[float] | None


def read_columns(path: Path, column: str, loss: str | None) -> Recorded:
    """Return the norms of a run, and its losses and the numbers of its steps if the file has them.

    Args:
        path: JSON lines (.jsonl, .json) or CSV with a header. Of JSON lines, a last one that is cut off is left out.
        column: of the norms. In a CSV it may also be the end of one header, as in a wandb export.
        loss: of the losses, likewise; `None`: `loss` if there is such a column.

    Raises:
        ValueError: the file cannot be read, or has no such column, or a norm has no loss beside it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            _json_rows(text)
            if path.suffix in (".jsonl", ".json")
            else list(csv.DictReader(text.splitlines(), restval=""))
        )
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))

    def find(wanted: str) -> str | None:
        ends = [name for name in names if name.split(" - ")[-1].strip() == wanted]
        return wanted if wanted in names else ends[0] if len(ends) == 1 else None

    def numbers(name: str) -> list[float]:
        try:
            values = [math.nan if row.get(name) in (None, "") else float(row[name]) for row in rows]
            return [value if math.isfinite(value) else math.nan for value in values]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"column={name} of {path} holds something that is no number: {error}") from error

    found, found_loss = find(column), find(loss or "loss")
    for wanted, there in ((f"column={column}", found), (f"loss={loss}", found_loss or loss is None)):
        if not there:
            raise ValueError(f"{wanted} is not in {path}: it has {', '.join(names) or 'no columns'}")
    assert found is not None
    rows = [row for row in rows if row.get(found, "") != ""]
    losses = numbers(found_loss) if found_loss else None
    without = sum(row.get(found_loss or "", "") == "" for row in rows) if found_loss else 0
    if without and loss is not None:
        raise ValueError(f"loss={loss} is missing in {without} of the {len(rows)} rows of {path} that have a norm")
    step = next((name for name in names if name.lower() in ("step", "_step", "global_step")), None)
    try:
        steps = numbers(step) if step else []
    except ValueError:
        steps = []
    if not steps or any(map(math.isnan, steps)):
        steps = [float(i) for i in range(1, len(rows) + 1)]
    norms = numbers(found)
    if any(norm < 0 for norm in norms):
        raise ValueError(f"column={found} of {path} holds {min(norms):g}: a norm is not below 0")
    return Recorded(steps, norms, None if without else losses)


def _json_rows(text: str) -> list[dict[str, Any]]:
    rows = []
    lines = text.rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) > 1 and not text.endswith("\n"):
                break  # a run that was killed leaves half a line
            raise ValueError(f"line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is no object, such as {{"grad_norm": 1.5}}')
        rows.append(row)
    return rows


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
        ValueError: an argument is not `key=value`, a key comes twice, or there are too many combinations.
    """
    options = {"clip": "zclip", "column": "grad_norm", "out": "replay.png"}
    values: dict[str, list[Any]] = {}
    given: set[str] = set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"{argument} is not KEY=VALUE; the file comes first")
        if key in given:
            raise ValueError(f"{argument} is the second value of {key}: give several as {key}=VALUE,VALUE")
        given.add(key)
        if key in (*options, "loss"):
            options[key] = value
        else:
            values[key] = [_parse(part) for part in value.split(",")]
    many = math.prod(len(several) for several in values.values())
    if many > MOST_SETTINGS:
        raise ValueError(f"these are {many:,} combinations of settings: at most {MOST_SETTINGS} are replayed at once")
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
    except Exception as error:  # importing runs whatever the module holds
        allowed = f"it must be one of {', '.join(STRATEGIES)}, or module.Class"
        reason = f"cannot be imported ({type(error).__name__}: {error})" if module else "is not known"
        raise ValueError(f"clip={name} {reason}: {allowed}") from error
    ours = isinstance(found, type) and issubclass(found, ClippingStrategy) and not found.per_tensor
    if not ours or (found.decide is ClippingStrategy.decide and found.clip is ClippingStrategy.clip):
        raise ValueError(
            f"clip={name} cannot be replayed: it must be a ClippingStrategy that looks at the global norm alone, which "
            "is all that a file has"
        )
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 after one sentence on stderr."""
    asked = any(argument in ("--help", "-h") for argument in arguments)
    if asked or len(arguments) < 2 or arguments[0] != "replay":
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        options, combinations, varied = settings(arguments[2:])
        recorded = read_columns(Path(arguments[1]), options["column"], options.get("loss"))
        if not recorded.norms:
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
            results.append(replay(strategy, recorded.norms, recorded.losses, label))
    except (ValueError, FloatingPointError) as error:
        print(f"zclip replay: error: {error}", file=sys.stderr)
        return 2
    width = max(len("settings"), *(len(result.label) for result in results))
    norms = recorded.norms
    fixed = [f"{key}={value!r}" for key, value in made[0][0].config().items() if key not in varied]
    print(f"{len(norms)} steps of {arguments[1]}, {made_by.__name__}({', '.join(fixed)})")
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
                draw(results, recorded.steps, Path(options["out"]))
            except (OSError, ValueError) as error:
                print(f"zclip replay: error: out={options['out']} cannot be written: {error}", file=sys.stderr)
                return 2
            print(f"picture: {options['out']}")
    return 0
