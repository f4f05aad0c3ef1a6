"""Printable figures of a comparison: loss against tokens and time, learning rate, and rank of the updates."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from relora_mora.config.schema import DECODER_LINEARS
from relora_mora.experiments.compare.groups import Group
from relora_mora.experiments.compare.reach import Reach
from relora_mora.experiments.compare.runs import Run, Series
from relora_mora.experiments.compare.table import common_sets, count, perplexities

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colors, which color-blind readers can tell apart. Lines and markers do the same in grayscale, and
# repeat after a different number of curves than colors do.
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
WIDTH = 7.0  # inches, the text width of a page


def styles() -> Iterator[dict[str, Any]]:
    """Yields color, line and marker for each group."""
    for colour, line, marker in zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False):
        yield {"color": colour, "linestyle": line, "marker": marker}


Axis = Literal["steps", "tokens", "time"]
Values = NDArray[np.float64]
VISIBLE = 0.4  # share of a zoomed panel's height that the final gap between curves fills


@dataclass(frozen=True)
class Curve:
    """A mean over seeds with the lowest and highest value, all [n]. ``x`` is in steps, tokens or seconds."""

    steps: list[int]
    x: Values
    mean: Values
    low: Values
    high: Values


def curve(group: Group, series: Callable[[Run], Series], axis: Axis, *, smooth: bool = False) -> Curve:
    """A metric of a group at the steps that all its runs have; it may be empty.

    ``smooth``: replaces each run's values by centered means over about a twenty-fifth of them.
    """
    of_runs = [series(run) for run in group.runs]
    steps = group.common_steps(of_runs)
    values = [np.array([each[step] for step in steps], dtype=float) for each in of_runs]
    if smooth:
        values = [running_mean(each, max(1, len(steps) // 50)) for each in values]
    rows = np.stack(values)
    return Curve(steps, positions(group, steps, axis), rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))


def positions(group: Group, steps: Sequence[int], axis: Axis) -> Values:
    """The positions of steps on an axis: steps, tokens trained on, or training seconds (mean over the runs)."""
    if axis == "steps":
        return np.array(steps, dtype=float)
    if axis == "tokens":
        return group.runs[0].tokens(steps).astype(float)
    return np.mean([run.seconds(steps) for run in group.runs], axis=0)


def running_mean(values: Values, half: int) -> Values:
    """Centered means over 2 half + 1 values, over fewer near the ends, with equally many on either side."""
    reach = [min(half, index, len(values) - 1 - index) for index in range(len(values))]
    return np.array([values[index - near : index + near + 1].mean() for index, near in enumerate(reach)])


def parting(curves: Sequence[Curve]) -> float | None:
    """The x from which a zoomed panel should start, so that the final gap fills a good part of its height.

    None if there are fewer than two curves.
    """
    curves = [each for each in curves if len(each.x) > 1]
    if len(curves) < 2:
        return None
    begin = max(each.x[0] for each in curves)
    end = min(each.x[-1] for each in curves)
    at_end = [float(np.interp(end, each.x, each.mean)) for each in curves]
    gap = max(at_end) - min(at_end)
    grid = np.linspace(begin, end, 201)
    heights = np.max([np.interp(grid, each.x, each.mean) for each in curves], axis=0) - min(at_end)
    shown = grid[heights > gap / VISIBLE]
    start = float(shown[-1]) if len(shown) else float(begin)
    return min(max(start, begin + (end - begin) / 4), begin + (end - begin) * 3 / 4)


REACH = "reach_"  # prefix of the name of a --reach figure
LEGEND_LINE = 0.2  # inches
LABEL_WIDTH = 40  # letters in a line next to a panel
PAGE_WIDTH = 100  # letters in a line below all panels
TITLES = {"steps": "steps", "tokens": "tokens trained on"}
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
MOST_MARKERS = 12
MOST_MERGES = 25  # more merges of a run are not marked


def figures_of(groups: Sequence[Group], reach: Reach | None = None, against: Group | None = None) -> dict[str, Figure]:
    """All figures of a comparison by name, with ranks if a run has merged, and with ``reach`` if given."""
    figures = {"loss_by_tokens": loss_figure(groups, "tokens"), "loss_by_time": loss_figure(groups, "time")}
    figures["perplexity"] = perplexity_figure(groups, against)
    figures["learning_rate"] = rate_figure(groups)
    ranks = rank_figure(groups)
    if ranks is not None:
        figures["effective_rank"] = ranks
    if reach is not None:
        figures[REACH + reach.title.replace(" ", "_")] = reach_figure(reach, groups)
    return figures


def loss_figure(groups: Sequence[Group], axis: Axis) -> Figure:
    """Loss against tokens or time: a row for each held-out set, with an enlarged panel on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    sets = common_sets(groups)
    merging = [group for group in groups if _marked_merges(group)]
    unit, title = _unit(groups, axis)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH, 2.6 * len(sets) + legend_height(groups)), layout="constrained")
        panels: Any = figure.subplots(len(sets), 2, squeeze=False)
        panels[0][1].set_title("enlarged")
        for (whole, zoomed), name in zip(panels, sets, strict=True):
            drawings = [
                Drawing(group, style, axis, unit, name, _height_of_merges(group, merging))
                for group, style in zip(groups, styles(), strict=False)
            ]
            for panel in (whole, zoomed):
                for drawing in drawings:
                    drawing.draw(panel)
                panel.set_xlabel(title)
                _count_on(panel, axis)
            whole.set_ylabel(f"loss on {name}, nats per token" if name else "validation loss, nats per token")
            _zoom(whole, zoomed, drawings)
            low, high = whole.get_ylim()
            for drawing in drawings:
                drawing.draw_training(whole)
            # losses on a different kind of training text may lie far outside
            bottom, top = whole.get_ylim()
            whole.set_ylim(max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2))
        add_legend(figure, panels[0][0], groups, training=True)
    return figure


class Drawing:
    """The losses of a group on one held-out set; ``unit`` is the axis unit, in tokens or seconds.

    Merges are marked at ``height``, a fraction of the panel's height.
    """

    def __init__(self, group: Group, style: dict[str, Any], axis: Axis, unit: float, name: str, height: float) -> None:
        self.group = group
        self.height = height
        self.style = style
        self.axis = axis
        self.unit = unit
        self.by_tokens = curve(group, lambda run: run.evaluations(name), "tokens")
        evaluations = curve(group, lambda run: run.evaluations(name), axis)
        self.curve = replace(evaluations, x=evaluations.x / unit)

    def draw(self, panel: Axes) -> None:
        _draw_curve(panel, self.curve, self.group, self.style)
        merges = [step for step in _marked_merges(self.group) if step <= self.curve.steps[-1]]
        if merges:
            x = positions(self.group, merges, self.axis) / self.unit
            panel.plot(
                x,
                [self.height] * len(x),
                "|",
                color=self.style["color"],
                markersize=5,
                markeredgewidth=1.2,
                transform=panel.get_xaxis_transform(),
            )

    def draw_training(self, panel: Axes) -> None:
        losses = curve(self.group, lambda run: run.series("train/loss"), self.axis, smooth=True)
        panel.plot(losses.x / self.unit, losses.mean, color=self.style["color"], linewidth=0.6, alpha=0.6, zorder=1)


def _height_of_merges(group: Group, merging: Sequence[Group]) -> float:
    """The height of a group's row of merge marks; the ``merging`` groups share the lowest fifth of a panel."""
    return 0.03 + min(0.05, 0.17 / len(merging)) * merging.index(group) if group in merging else 0.0


def _marked_merges(group: Group) -> list[int]:
    """The steps of a group's merges; empty if there are too many to tell apart."""
    merges = group.runs[0].merges
    return merges if len(merges) <= MOST_MERGES else []


def _unit(groups: Sequence[Group], axis: Axis) -> tuple[float, str]:
    """(size, title) of the axis unit; for time the largest unit such that the longest run takes at least two."""
    if axis != "time":
        return 1.0, TITLES[axis]
    longest = max(run.seconds(run.last_step) for group in groups for run in group.runs)
    size, unit = next((each for each in UNITS if longest >= 2 * each[0]), UNITS[-1])
    return size, f"time of steps and merges, {unit}"


def _count_on(panel: Axes, axis: Axis, ticks: int = 5) -> None:

    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(ticks))
    if axis == "tokens":
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _zoom(whole: Axes, zoomed: Axes, drawings: Sequence[Drawing]) -> None:
    """Enlarges the end of the curves in the right panel and marks the region in the left; hides it for one curve."""
    start = parting([each.by_tokens for each in drawings])
    if start is None:
        zoomed.set_visible(False)
        return
    curves = [each.curve for each in drawings]
    left = min(float(np.interp(start, each.by_tokens.x, each.curve.x)) for each in drawings)
    right = max(each.x[-1] for each in curves)
    inside = [each.x >= left for each in curves]
    low = min(each.low[shown].min() for each, shown in zip(curves, inside, strict=True) if shown.any())
    high = max(each.high[shown].max() for each, shown in zip(curves, inside, strict=True) if shown.any())
    margin = 0.05 * (high - low) or 0.01
    zoomed.set_xlim(left, right + 0.02 * (right - left))
    zoomed.set_ylim(low - margin, high + margin)
    whole.indicate_inset((left, low - margin, right - left, high - low + 2 * margin), edgecolor="#777777")


def perplexity_figure(groups: Sequence[Group], against: Group | None = None) -> Figure:
    """The last perplexity of each run as a dot and each group's mean as a stroke, in a panel for each held-out set.

    The group with the lowest perplexity on the last set is at the top. The dashed line is the mean of ``against``, by
    default the first group. If other groups are larger, the label of a group with one run says so.
    """
    import matplotlib
    from matplotlib.figure import Figure

    sets = common_sets(groups)
    against = against or groups[0]
    styled = sorted(zip(groups, styles(), strict=False), key=lambda each: np.mean(perplexities(each[0], sets[-1])))
    groups = [group for group, _ in styled]
    several = any(len(group.runs) > 1 for group in groups)
    seeds = [" (1 seed)" if several and len(group.runs) == 1 else "" for group in groups]
    names = [f"{group.label}{of_group}{_state(group)}" for group, of_group in zip(groups, seeds, strict=True)]
    labels = [textwrap.fill(name, LABEL_WIDTH) for name in names]
    heights = np.array([label.count("\n") + 1.6 for label in labels])  # in lines
    rows = np.cumsum(heights) - heights / 2
    line = textwrap.fill(f"dashed: {against.label}", PAGE_WIDTH)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.15 * (heights.sum() + line.count("\n"))), layout="constrained")
        panels: Any = figure.subplots(1, len(sets), sharey=True, squeeze=False)
        for panel, name in zip(panels[0], sets, strict=True):
            reference = np.mean(perplexities(against, name))
            panel.axvline(reference, color="#777777", linestyle="--", linewidth=1.0, zorder=1)
            for row, (group, style) in zip(rows, styled, strict=True):
                values = perplexities(group, name)
                panel.plot(values, [row] * len(values), "o", color=style["color"], markerfacecolor="none")
                panel.plot(np.mean(values), row, "|", color=style["color"], markersize=11, markeredgewidth=1.5)
            panel.set_xlabel(f"perplexity on {name}" if name else "validation perplexity")
        panels[0][0].set_yticks(rows, labels)
        panels[0][0].set_ylim(heights.sum(), 0)  # the first row at the top
        figure.supxlabel(line, fontsize=PAPER["axes.labelsize"])
    return figure


def rate_figure(groups: Sequence[Group]) -> Figure:

    figure = metric_figure(groups, Run.rates, "learning rate of the matrices", markers=False)
    figure.axes[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    return figure


def reach_figure(reach: Reach, groups: Sequence[Group]) -> Figure:
    """The metric against steps, with a horizontal line at each value."""
    figure = metric_figure(groups, lambda run: run.series(reach.tag), reach.title, axis="steps")
    for value in reach.values:
        figure.axes[0].axhline(value, color="#777777", linestyle=":", linewidth=1.0, zorder=1)
    return figure


def metric_figure(
    groups: Sequence[Group],
    series: Callable[[Run], Series],
    title: str,
    *,
    axis: Axis = "tokens",
    markers: bool = True,
) -> Figure:
    """A metric of the runs, with a band over the seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH * 0.6, 2.4 + legend_height(groups, WIDTH * 0.6)), layout="constrained")
        panel = figure.subplots()
        for group, style in zip(groups, styles(), strict=False):
            each = curve(group, series, axis)
            _draw_curve(panel, each, group, style if markers else {**style, "marker": None})
        panel.set_xlabel(_unit(groups, axis)[1])
        _count_on(panel, axis)
        panel.set_ylabel(title)
        add_legend(figure, panel, groups)
    return figure


def rank_figure(
    groups: Sequence[Group], tag: str = "merge/effective_rank", title: str = "effective rank of a merge"
) -> Figure | None:
    """Effective ranks in a panel for each kind of projection; None if no group has any.

    Ranks of a merge are measured in one layer in the middle of the model (docs/method.md).
    """
    import matplotlib
    from matplotlib.figure import Figure

    having = {
        kind: [each for each in groups if each.common_steps([run.series(f"{tag}/{kind}") for run in each.runs])]
        for kind in DECODER_LINEARS
    }
    kinds = [kind for kind in DECODER_LINEARS if having[kind]]
    if not kinds:
        return None
    shown = [group for group in groups if any(group in of_kind for of_kind in having.values())]
    with matplotlib.rc_context(PAPER):
        rows = -(-len(kinds) // 4)
        figure = Figure(figsize=(WIDTH, 1.8 * rows + legend_height(shown)), layout="constrained")
        panels: Any = figure.subplots(rows, min(4, len(kinds)), sharex=True, sharey=True, squeeze=False)
        for panel, kind in zip(panels.flat, kinds, strict=False):
            panel.set_title(kind)
            for group, style in zip(groups, styles(), strict=False):
                if group in having[kind]:
                    each = curve(group, partial(Run.series, tag=f"{tag}/{kind}"), "tokens")
                    _draw_curve(panel, each, group, style)
            panel.xaxis.set_tick_params(labelbottom=True)
            _count_on(panel, "tokens", ticks=3)
        for panel in panels.flat[len(kinds) :]:
            panel.set_visible(False)
        limits = [panel.dataLim for panel in panels.flat[: len(kinds)]]
        low, high = min(each.ymin for each in limits), max(each.ymax for each in limits)
        margin = 0.08 * (high - low) or 1.0
        panels[0][0].set_ylim(max(0.0, low - margin), high + margin)
        panels[0][0].set_xlim(left=0)
        for panel in panels.flat[max(0, len(kinds) - panels.shape[1]) : len(kinds)]:
            panel.set_xlabel("tokens")
        for panel in panels[:, 0]:
            panel.set_ylabel(title)
        add_legend(figure, panels[0][0], shown)
    return figure


def _draw_curve(panel: Axes, each: Curve, group: Group, style: dict[str, Any]) -> None:

    panel.plot(each.x, each.mean, label=name_of(group), markevery=-(-len(each.x) // MOST_MARKERS), **style)
    if len(group.runs) > 1:
        panel.fill_between(each.x, each.low, each.high, color=style["color"], alpha=0.2, linewidth=0)


def name_of(group: Group) -> str:
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    return f"{group.label}{seeds}{_state(group)}"


def _state(group: Group) -> str:
    return f" [{group.state}]" if group.state else ""


def _columns(groups: Sequence[Group]) -> int:
    longest = max((len(name_of(group)) for group in groups), default=0)
    return 1 if longest > 50 else 2 if longest > 28 else 3


def legend_height(groups: Sequence[Group], width: float = WIDTH) -> float:
    """The height of the legend of a figure of this width, both in inches."""
    wrapped = sum(len(name_of(group)) // _letters(width) for group in groups)
    return LEGEND_LINE * (-(-(len(groups) + 2) // _columns(groups)) + wrapped)


def _letters(width: float) -> int:
    return int(PAGE_WIDTH * width / WIDTH)


def add_legend(figure: Figure, panel: Axes, groups: Sequence[Group], *, training: bool = False) -> None:

    from matplotlib.lines import Line2D

    handles, labels = panel.get_legend_handles_labels()
    if training:
        handles.append(Line2D([], [], color="#777777", linewidth=0.6))
        labels.append("training, running mean")
        if any(_marked_merges(group) for group in groups):
            handles.append(Line2D([], [], color="#777777", linestyle="", marker="|", markersize=5, markeredgewidth=1.2))
            labels.append("merge")
    labels = [textwrap.fill(label, _letters(figure.get_figwidth())) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=_columns(groups), handlelength=4)
