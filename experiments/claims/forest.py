"""The picture of all verdicts: each estimate with its interval, as a multiple of the smallest effect of interest."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.claims.verdict import (
    ABOVE,
    BELOW,
    CONTRADICTED,
    NO_EFFECT,
    SUPPORTED,
    UNDECIDED,
    Part,
    Verdict,
)
from experiments.run.style import BLACK, BLUE, ORANGE

#: Marks and colours of the outcomes. The marks differ without colour too.
MARKS = {SUPPORTED: ("o", BLUE), CONTRADICTED: ("X", ORANGE), NO_EFFECT: ("s", BLACK), UNDECIDED: ("D", "0.45")}
#: Characters in a line of a claim.
WIDTH = 38
#: Multiples beyond which an interval is cut off.
FARTHEST = 300.0


def draw_verdicts(verdicts: Sequence[Verdict]) -> Figure | None:
    """Return the picture: a row for each testable claim, shaded where the interval must lie; `None` without any."""
    rows = [(verdict, verdict.part) for verdict in verdicts if verdict.part is not None]
    if not rows:
        return None
    ends = [end for _, part in rows for end in multiples(part)]
    limit = min(FARTHEST, max([3.0, *(1.5 * abs(end) for end in ends if math.isfinite(end))]))
    figure, ax = plt.subplots(figsize=(7.2, 0.5 * len(rows) + 1.5), layout="constrained")
    for row, (verdict, part) in enumerate(rows):
        low, high = _wanted(verdict, part)
        ax.fill_betweenx([row - 0.36, row + 0.36], max(low, -limit), min(high, limit), color="0.9", lw=0)
        ends_of_row = [min(max(end, -limit), limit) for end in multiples(part)]
        mark, color = MARKS[verdict.outcome]
        ax.plot(ends_of_row[1:], [row, row], color=color, lw=1.8)
        face = "white" if verdict.outcome == UNDECIDED else color
        ax.plot(ends_of_row[:1], [row], mark, color=color, mfc=face, ms=7)
    for bound in (-1, 0, 1):
        ax.axvline(bound, color="0.5", lw=0.8, ls="-" if not bound else ":", zorder=0)
    ax.set_yticks(range(len(rows)), [textwrap.fill(verdict.claim.text, WIDTH) for verdict, _ in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(-limit, limit)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(
        "estimate and 95 % interval, in smallest effects of interest;\nshaded: where the claim is supported", fontsize=8
    )
    for outcome in dict.fromkeys(verdict.outcome for verdict, _ in rows):
        mark, color = MARKS[outcome]
        ax.plot([], [], mark, color=color, mfc="white" if outcome == UNDECIDED else color, label=outcome)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def multiples(part: Part) -> tuple[float, float, float]:
    """Return an estimate and the ends of its interval as multiples of the smallest effect of interest."""
    size = abs(part.smallest.bound)
    low, high = part.number.interval()
    return part.number.value / size, low / size, high / size


def _wanted(verdict: Verdict, part: Part) -> tuple[float, float]:
    """Return where the interval must lie, in multiples."""
    bound = math.copysign(1.0, part.smallest.bound)
    if verdict.claim.asserts == ABOVE:
        return bound, math.inf
    return (-math.inf, bound) if verdict.claim.asserts == BELOW else (-1.0, 1.0)
