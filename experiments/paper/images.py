"""Figures inside the page: as SVG where that is small, else as PNG with few colours."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from experiments.run.style import COLORS, image

#: Largest SVG of a figure in the page, in bytes; a larger one is shown as PNG.
MAX_SVG = 60_000
#: Resolution of a PNG.
DPI = 90
#: Number of tints of each colour of lines in the palette of a PNG, and of colours that the figure adds to these.
TINTS, FURTHER = 16, 100


def data_uri(figure: Figure, max_svg: int = MAX_SVG) -> str:
    """Return a figure as the address of an image that has its content, and close the figure."""
    content, kind = small_svg(figure), "svg+xml"
    if len(content) > max_svg:
        content, kind = small_png(figure), "png"
    plt.close(figure)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def small_svg(figure: Figure) -> bytes:
    """Return a figure as SVG whose paths have two decimals: a hundredth of a point.

    Other numbers stay as they are: `scale(0.015625)` makes letters of the units of a font.
    """
    return re.sub(rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), image(figure, "svg"))


def small_png(figure: Figure) -> bytes:
    """Return a figure as PNG with a palette, which has the colours of lines exactly."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(image(figure, "png", dpi=DPI))) as opened:
        picture = opened.convert("RGB")
    picture.quantize(palette=_palette(picture), dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _palette(picture: Image.Image) -> Image.Image:
    """Return an image whose palette has tints of the colours of lines, and the most frequent colours of a picture."""
    shares = np.linspace(0, 1, TINTS)[:, None]
    tints = np.concatenate([shares + (1 - shares) * np.array(to_rgb(color)) for color in COLORS])
    further = picture.quantize(FURTHER).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*np.rint(255 * tints).astype(int).ravel().tolist(), *further[: 3 * FURTHER]])
    return palette
