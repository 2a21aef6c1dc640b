"""The look of all figures: a colour-blind-safe palette, line styles and grids."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.escape import visible

matplotlib.use("Agg")
matplotlib.rcParams["figure.constrained_layout.use"] = True
matplotlib.rcParams["svg.hashsalt"] = "zclip"  # equal figures are equal files

#: The palette of Okabe and Ito without its yellow; black comes last.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
#: Line styles, so that lines differ without colour too.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")


class LineStyle(NamedTuple):
    """The colour and the dashes of a line."""

    color: str
    dashes: Any


#: The lines of clipping strategies, by `clip.name`: the same in every comparison. In grey, their dashes differ.
STRATEGY_STYLES = {
    "zclip": LineStyle(BLUE, DASHES[0]),
    "fixed": LineStyle(ORANGE, DASHES[1]),
    "none": LineStyle(AMBER, DASHES[2]),
    "autoclip": LineStyle(GREEN, DASHES[3]),
    "adagc": LineStyle(PURPLE, DASHES[4]),
    "agc": LineStyle(SKY, DASHES[5]),
    "skip_step": LineStyle(BLACK, DASHES[6]),
    "zclip_mean": LineStyle(SKY, DASHES[1]),
    "zclip_max": LineStyle(PURPLE, DASHES[2]),
    "log_z_score": LineStyle(SKY, DASHES[3]),
    "lagged_z_score": LineStyle(SKY, DASHES[4]),
    "tensor_autoclip": LineStyle(GREEN, DASHES[5]),
    "global_adagc": LineStyle(PURPLE, DASHES[6]),
    "gradient_stabilizer": LineStyle(BLACK, DASHES[3]),
}


def numbered_style(number: int) -> LineStyle:
    """Return the style of a line by its number in a figure: the first 49 differ."""
    return LineStyle(COLORS[number % len(COLORS)], DASHES[(number + number // len(COLORS)) % len(DASHES)])


def graded_styles(number: int) -> list[LineStyle]:
    """Return the styles of lines that are values of one setting, from dark to light: their order shows in grey too."""
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.85, number))
    return [LineStyle(to_hex(shade), DASHES[at % len(DASHES)]) for at, shade in enumerate(shades)]


def line_styles(strategies: Sequence[str]) -> list[LineStyle]:
    """Return the style of each line: that of its strategy (`clip.name`), if the lines are of different ones.

    Lines that are all of one strategy are graded.
    """
    if len({*strategies}) == len(strategies) and STRATEGY_STYLES.keys() >= {*strategies}:
        return [STRATEGY_STYLES[name] for name in strategies]
    if len({*strategies}) == 1:
        return graded_styles(len(strategies))
    return [numbered_style(number) for number in range(len(strategies))]


def draw_grid(figure: Figure) -> None:
    """Draw the grid of all axes, and let lines begin near the edge."""
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.margins(x=0.01)


def image(figure: Figure, suffix: str, **options: Any) -> bytes:
    """Return the content of an image file, without the time at which it was made. Its texts are shown as they are."""
    numbers = {id(text) for axis in figure.findobj(Axis) for text in axis.findobj(Text)} - {
        id(axis.label) for axis in figure.findobj(Axis)
    }
    for text in figure.findobj(Text):
        if id(text) in numbers:  # powers of ten at ticks are formulas
            continue
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))
    out = io.BytesIO()
    figure.savefig(out, format=suffix, metadata={"Date": None} if suffix == "svg" else None, **options)
    return out.getvalue()
