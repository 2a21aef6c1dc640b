"""The metrics of all steps of a run, in memory and in its checkpoints, so that metrics.jsonl can be written again."""

import json
import math
from array import array
from collections.abc import Mapping

import torch
from torch import Tensor

from common.run_files import is_measured


class History:
    """The numbers of the steps from 1 on, by column: 8 bytes for each.

    A number that is null in metrics.jsonl is NaN here. So are all of a step whose line was lost, and is in no
    checkpoint: its `tokens` tell it from other steps.
    """

    def __init__(self, columns: Mapping[str, Tensor] | None = None) -> None:
        """Make an empty history, or that of which a checkpoint holds the `state`."""
        self._columns = {
            name: array("d", column.contiguous().numpy().tobytes()) for name, column in (columns or {}).items()
        }
        self.steps = max(map(len, self._columns.values()), default=0)

    def state(self) -> dict[str, Tensor]:
        """Return (steps,) the bits of each column as int64, in which equal columns are equal, NaN or not."""
        return {
            name: torch.frombuffer(bytearray(column.tobytes()), dtype=torch.int64)
            for name, column in self._columns.items()
            if not is_measured(name)
        }

    def add(self, row: Mapping[str, float | None]) -> None:
        """Add the line of the next step."""
        self._extend(1)
        self._set(self.steps, row)

    def merge(self, lines: Mapping[int, Mapping[str, float | None]], steps: int) -> int:
        """Take what the lines of a file add to the history of so many steps, and return how many lines were lost.

        A line that contradicts the history counts as lost. Of steps that the history lacks, it takes all.
        """
        known, lost = self.steps, 0
        self._extend(steps - known)
        for step in range(1, steps + 1):
            line = lines.get(step)
            if line is None or (step <= known and not self._agrees(step, line)):
                lost += 1
            else:
                self._set(step, line)
        return lost

    def line(self, step: int) -> bytes:
        """Return the line of a step in metrics.jsonl; nothing if it was lost."""
        row = {name: column[step - 1] for name, column in self._columns.items()}
        if math.isnan(row["tokens"]):
            return b""
        numbers = {name: None if math.isnan(value) else value for name, value in row.items()}
        return json.dumps({"step": step, **numbers, "tokens": int(row["tokens"])}).encode() + b"\n"

    def tokens(self) -> int | None:
        """Return the tokens of all steps so far; `None` if the line of the last one was lost."""
        last = self._columns["tokens"][-1] if self.steps and "tokens" in self._columns else math.nan
        return None if math.isnan(last) else int(last)

    def losses(self) -> list[float | None]:
        """Return the loss of each step; `None` where the loss or the gradients were not finite.

        A step whose line was lost has the loss of the step before.
        """
        losses: list[float | None] = []
        for tokens, norm, loss in zip(
            *(self._columns.get(name, ()) for name in ("tokens", "grad_norm", "loss")), strict=True
        ):
            if math.isnan(tokens):
                losses += losses[-1:] or [None]
            else:
                losses.append(None if math.isnan(norm) or math.isnan(loss) else loss)
        return losses

    def _extend(self, steps: int) -> None:
        nothing = array("d", [math.nan]) * steps
        for column in self._columns.values():
            column.extend(nothing)
        self.steps += steps

    def _set(self, step: int, row: Mapping[str, float | None]) -> None:
        for name, value in row.items():
            if name != "step" and name not in self._columns:
                self._columns[name] = array("d", [math.nan]) * self.steps
            if name != "step" and value is not None:
                self._columns[name][step - 1] = value

    def _agrees(self, step: int, row: Mapping[str, float | None]) -> bool:
        """Whether a line has the numbers of the history, but for those that are not in checkpoints."""
        own = {name: column[step - 1] for name, column in self._columns.items() if not is_measured(name)}
        theirs = {name: math.nan if value is None else value for name, value in row.items() if name != "step"}
        return all(_same(value, theirs.get(name, math.nan)) for name, value in own.items()) and all(
            name in own or is_measured(name) for name in theirs
        )


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
