"""How figures look: colours, lines and markers of the curves, and what a page in print asks of fonts and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart; lines and markers tell as much in grey, and come round
# after other numbers of curves than colours do
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PAPER: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
}
WIDTH = 7.0  # inches, of the text of a page


def styles() -> Iterator[dict[str, Any]]:
    """Colour, line and marker of each group in turn."""
    for colour, line, marker in zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False):
        yield {"color": colour, "linestyle": line, "marker": marker}
