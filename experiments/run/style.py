"""The look of all figures: a colour-blind-safe palette, line styles and grids."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
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
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (10, 3)), (0, (1, 3)))
#: Markers of lines with few points.
MARKERS = ("o", "s", "D", "^", "v", "<", ">", "P", "X", "*", "p", "h", "8", "d")


class LineStyle(NamedTuple):
    """The colour, the dashes and the marker of a line. Lines with many points have no markers."""

    color: str
    dashes: Any
    marker: str = "o"


#: The lines of clipping strategies, by `clip.name`, and of all else that figures compare, by its label there: the same
#: in every figure. In grey, their dashes differ, or their markers where there are more lines than dashes.
STRATEGY_STYLES = {
    "zclip": LineStyle(BLUE, DASHES[0], "o"),
    "fixed": LineStyle(ORANGE, DASHES[1], "s"),
    "none": LineStyle(AMBER, DASHES[2], "D"),
    "autoclip": LineStyle(GREEN, DASHES[3], "^"),
    "adagc": LineStyle(PURPLE, DASHES[4], "v"),
    "agc": LineStyle(SKY, DASHES[5], "<"),
    "skip_step": LineStyle(BLACK, DASHES[6], ">"),
    "zclip_mean": LineStyle(SKY, DASHES[1], "h"),
    "zclip_max": LineStyle(PURPLE, DASHES[2], "8"),
    "log_z_score": LineStyle(SKY, DASHES[3], "p"),
    "lagged_z_score": LineStyle(SKY, DASHES[4], "d"),
    "tensor_autoclip": LineStyle(GREEN, DASHES[2], "s"),
    "global_adagc": LineStyle(PURPLE, DASHES[6], "D"),
    "gradient_stabilizer": LineStyle(BLACK, DASHES[3], "X"),
    "update clipping": LineStyle(BLACK, DASHES[0], "^"),
    "brake": LineStyle(BLACK, DASHES[4], "P"),
    "ZClip and brake": LineStyle(PURPLE, DASHES[3], "X"),
    "brake from the fork on": LineStyle(GREEN, DASHES[1], "<"),
    "brake without recovery": LineStyle(ORANGE, DASHES[5], ">"),
    "half the rate by hand": LineStyle(SKY, DASHES[0], "h"),
    "a tenth of the rate by hand": LineStyle(PURPLE, DASHES[5], "8"),
    "instance filter": LineStyle(GREEN, DASHES[5], "*"),
    "QK-norm": LineStyle(ORANGE, DASHES[0], "*"),
    "z-loss 1e-4": LineStyle(SKY, DASHES[6], "p"),
    "QK-norm and ZClip": LineStyle(BLUE, DASHES[5], "h"),
    "warm-up of 10 %": LineStyle(GREEN, DASHES[0], "<"),
    "beta2 0.95": LineStyle(BLACK, DASHES[1], ">"),
    "embeddings of 0.079": LineStyle(ORANGE, DASHES[6], "8"),
    "embeddings of 1": LineStyle(AMBER, DASHES[5], "d"),
}
#: Which strategy (`clip.name`) a label means.
STRATEGY_LABELS = {
    "no clipping": "none",
    "fixed 1.0": "fixed",
    "ZClip": "zclip",
    "AutoClip": "autoclip",
    "AdaGC": "adagc",
    "GlobalAdaGC": "global_adagc",
    "AGC": "agc",
    "log z-score": "log_z_score",
    "lagged z-score": "lagged_z_score",
    "TensorAutoClip": "tensor_autoclip",
    "GradientStabilizer": "gradient_stabilizer",
    "skip-step": "skip_step",
}


def label_styles(labels: Sequence[str]) -> dict[str, LineStyle]:
    """Return the style of the line of each label in a figure, by label: that of `STRATEGY_STYLES`, if it has one.

    Other labels have styles that are not in `STRATEGY_STYLES`, by their order: the first 20 have other colours or
    dashes, later ones other markers.

    Raises:
        ValueError: the labels are more than there are styles.
    """
    pairs = [(style.color, style.dashes) for style in STRATEGY_STYLES.values()]
    unnamed = [numbered_style(number) for number in range(len(COLORS) * len(DASHES))]
    free = [style for style in unnamed if (style.color, style.dashes) not in pairs]
    more = (style._replace(marker=marker) for marker in MARKERS for style in free)
    names = {label: STRATEGY_LABELS.get(label, label) for label in labels}
    if sum(name not in STRATEGY_STYLES for name in names.values()) > len(free) * len(MARKERS):
        raise ValueError(f"a figure cannot have {len(labels)} lines")
    return {label: STRATEGY_STYLES.get(name) or next(more) for label, name in names.items()}


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


def draw_log_axis(ax: Axes, size: float) -> None:
    """Make the vertical axis logarithmic, with numbers of this font size at 1, 2 and 5 times the powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    ax.tick_params(which="both", labelsize=size)


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
