"""Curves of groups of runs, and the look of all figures: size, colors, panels and legends, for print."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from relora_mora.experiments.compare.groups import Group, common_steps
from relora_mora.experiments.compare.runs import Run, Series
from relora_mora.experiments.compare.table import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Axis = Literal["tokens", "time"]
Values = NDArray[np.float64]

# Okabe and Ito's colors, which color-blind readers can tell apart. Lines and markers do the same in grayscale, and
# repeat after a different number of curves than colors do.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GRAY = "#777777"  # of what belongs to no group
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
WIDTH = 7.0  # inches, the text width of a page
LETTERS = 100  # in a line of this width
LEGEND_LINE = 0.2  # inches
IN_A_ROW = 4  # panels of projections
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
MOST_MARKERS = 12


def styles() -> Iterator[dict[str, Any]]:
    """Yields color, line and marker for each group."""
    for color, line, marker in zip(cycle(COLORS), cycle(LINES), cycle(MARKERS), strict=False):
        yield {"color": color, "linestyle": line, "marker": marker}


def styled(groups: Iterable[Group]) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Each group with its style, which is the same in all figures of a comparison."""
    return zip(groups, styles(), strict=False)


@contextmanager
def paper_figure(height: float, width: float = WIDTH) -> "Iterator[Figure]":
    """An empty figure of this size in inches; what is drawn in the block has the style of ``PAPER``."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PAPER):
        yield Figure(figsize=(width, height), layout="constrained")


@contextmanager
def figure_of_kinds(
    kinds: Sequence[str], groups: Sequence[Group], title: str, *, sharex: bool
) -> "Iterator[tuple[Figure, Any]]":
    """A figure with a panel for each kind of projection, and its panels [rows, columns]. The block draws the curves."""
    rows = -(-len(kinds) // IN_A_ROW)
    with paper_figure(1.8 * rows + legend_height(groups)) as figure:
        panels: Any = figure.subplots(rows, min(IN_A_ROW, len(kinds)), sharex=sharex, sharey=True, squeeze=False)
        for panel, kind in zip(panels.flat, kinds, strict=False):
            panel.set_title(kind)
        for panel in panels.flat[len(kinds) :]:
            panel.set_visible(False)
        for panel in panels[:, 0]:
            panel.set_ylabel(title)
        yield figure, panels
        add_legend(figure, panels[0][0], groups)


def name_of(group: Group) -> str:
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return f"{group.label}{seeds}{state_of(group)}"


def state_of(group: Group) -> str:
    return f" [{group.state}]" if group.state else ""


def legend_height(groups: Sequence[Group], width: float = WIDTH) -> float:
    """The height of the legend of a figure of this width, both in inches."""
    wrapped = sum(len(name_of(group)) // _letters(width) for group in groups)
    return LEGEND_LINE * (-(-(len(groups) + 2) // _columns(groups)) + wrapped)


def add_legend(figure: "Figure", panel: "Axes", groups: Sequence[Group], more: "Sequence[Line2D]" = ()) -> None:
    """Adds the legend of the curves in ``panel`` below all panels; ``more`` are entries that come last."""
    handles, labels = panel.get_legend_handles_labels()
    labels = [
        textwrap.fill(label, _letters(figure.get_figwidth()))
        for label in [*labels, *(str(each.get_label()) for each in more)]
    ]
    figure.legend([*handles, *more], labels, loc="outside lower center", ncols=_columns(groups), handlelength=4)


def _columns(groups: Sequence[Group]) -> int:
    longest = max((len(name_of(group)) for group in groups), default=0)
    return 1 if longest > 50 else 2 if longest > 28 else 3


def _letters(width: float) -> int:
    return int(LETTERS * width / WIDTH)


@dataclass(frozen=True)
class Curve:
    """A mean over seeds with the lowest and highest value, all [n]. ``x`` is in tokens or a unit of time."""

    steps: list[int]
    x: Values
    mean: Values
    low: Values
    high: Values

    def draw(self, panel: "Axes", group: Group, style: dict[str, Any]) -> None:
        """Draws the mean, and a band over the seeds."""
        panel.plot(self.x, self.mean, label=name_of(group), markevery=-(-len(self.x) // MOST_MARKERS), **style)
        if len(group.runs) > 1:
            panel.fill_between(self.x, self.low, self.high, color=style["color"], alpha=0.2, linewidth=0)


def curve(
    group: Group, series: Callable[[Run], Series], axis: Axis, unit: float = 1.0, *, smooth: bool = False
) -> Curve:
    """A metric of a group at the steps that all its runs have; it may be empty.

    ``unit``: the unit of the axis, in tokens or seconds. ``smooth``: replaces each run's values by centered means over
    about a twenty-fifth of them.
    """
    of_runs = [series(run) for run in group.runs]
    steps = common_steps(of_runs)
    values = [np.array([each[step] for step in steps], dtype=float) for each in of_runs]
    if smooth:
        values = [running_mean(each, max(1, len(steps) // 50)) for each in values]
    rows = np.stack(values)
    x = positions(group, steps, axis) / unit
    return Curve(steps, x, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))


def positions(group: Group, steps: Sequence[int], axis: Axis) -> Values:
    """The positions of steps on an axis: tokens trained on, or training seconds (mean over the runs)."""
    if axis == "tokens":
        return group.runs[0].tokens(steps).astype(float)
    return np.mean([run.seconds(steps) for run in group.runs], axis=0)


def running_mean(values: Values, half: int) -> Values:
    """Centered means over 2 half + 1 values, over fewer near the ends, with equally many on either side."""
    reach = [min(half, index, len(values) - 1 - index) for index in range(len(values))]
    return np.array([values[index - near : index + near + 1].mean() for index, near in enumerate(reach)])


def unit_of(groups: Sequence[Group], axis: Axis) -> tuple[float, str]:
    """(size, title) of the axis unit; for time the largest unit such that the longest run takes at least two."""
    if axis == "tokens":
        return 1.0, "tokens trained on"
    longest = max(run.seconds(run.last_step) for group in groups for run in group.runs)
    size, unit = next((each for each in UNITS if longest >= 2 * each[0]), UNITS[-1])
    return size, f"time of steps and merges, {unit}"


def set_ticks(panel: "Axes", axis: Axis, ticks: int = 5) -> None:
    """Puts about this many ticks on the horizontal axis; tokens are written like ``1.5M``."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(ticks))
    if axis == "tokens":
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
