"""The look of all figures: a colour-blind-safe palette and line styles."""

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "zclip"  # equal figures are equal files

#: The palette of Okabe and Ito without its yellow; black comes last.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK)
#: Line styles, so that lines differ without colour too.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), ":")
