"""The figure of losses against tokens or time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from relora_mora.experiments.compare.curves import (
    GRAY,
    Axis,
    Curve,
    add_legend,
    curve,
    legend_height,
    paper_figure,
    positions,
    set_ticks,
    styled,
    unit_of,
)
from relora_mora.experiments.compare.groups import Group
from relora_mora.experiments.compare.table import common_sets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VISIBLE = 0.4  # share of a zoomed panel's height that the final gap between curves fills
MOST_MERGES = 25  # more merges of a run are not marked
TRAINING: Any = {"linewidth": 0.6}
MERGE: Any = {"linestyle": "", "marker": "|", "markersize": 5, "markeredgewidth": 1.2}


def loss_figure(groups: Sequence[Group], axis: Axis) -> "Figure":
    """Loss against tokens or time: a row for each held-out set, with an enlarged panel on the right."""
    from matplotlib.lines import Line2D

    sets = common_sets(groups)
    merging = [group for group in groups if _marked_merges(group)]
    unit, title = unit_of(groups, axis)
    with paper_figure(2.6 * len(sets) + legend_height(groups)) as figure:
        panels: Any = figure.subplots(len(sets), 2, squeeze=False)
        panels[0][1].set_title("enlarged")
        for (whole, zoomed), name in zip(panels, sets, strict=True):
            drawings = [
                Drawing(group, style, axis, unit, name, _height_of_merges(group, merging))
                for group, style in styled(groups)
            ]
            for panel in (whole, zoomed):
                for drawing in drawings:
                    drawing.draw(panel)
                panel.set_xlabel(title)
                set_ticks(panel, axis)
            whole.set_ylabel(f"loss on {name}, nats per token" if name else "validation loss, nats per token")
            _zoom(whole, zoomed, drawings)
            low, high = whole.get_ylim()
            for drawing in drawings:
                drawing.draw_training(whole)
            # losses on a different kind of training text may lie far outside
            bottom, top = whole.get_ylim()
            whole.set_ylim(max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2))
        more = [Line2D([], [], color=GRAY, label="training, running mean", **TRAINING)]
        if merging:
            more.append(Line2D([], [], color=GRAY, label="merge", **MERGE))
        add_legend(figure, panels[0][0], groups, more)
    return figure


class Drawing:
    """The losses of a group on one held-out set; ``unit`` is the axis unit, in tokens or seconds.

    Merges are marked at ``height``, a fraction of the panel's height.
    """

    def __init__(self, group: Group, style: dict[str, Any], axis: Axis, unit: float, name: str, height: float) -> None:
        self.group = group
        self.style = style
        self.axis = axis
        self.unit = unit
        self.height = height
        self.by_tokens = curve(group, lambda run: run.evaluations(name), "tokens")
        evaluations = curve(group, lambda run: run.evaluations(name), axis)
        self.curve = replace(evaluations, x=evaluations.x / unit)

    def draw(self, panel: "Axes") -> None:
        self.curve.draw(panel, self.group, self.style)
        merges = [step for step in _marked_merges(self.group) if step <= self.curve.steps[-1]]
        if merges:
            x = positions(self.group, merges, self.axis) / self.unit
            along = panel.get_xaxis_transform()
            panel.plot(x, [self.height] * len(x), color=self.style["color"], transform=along, **MERGE)

    def draw_training(self, panel: "Axes") -> None:
        losses = curve(self.group, lambda run: run.series("train/loss"), self.axis, smooth=True)
        panel.plot(losses.x / self.unit, losses.mean, color=self.style["color"], alpha=0.6, zorder=1, **TRAINING)


def _marked_merges(group: Group) -> list[int]:
    """The steps of a group's merges; empty if there are too many to tell apart."""
    merges = group.runs[0].merges
    return merges if len(merges) <= MOST_MERGES else []


def _height_of_merges(group: Group, merging: Sequence[Group]) -> float:
    """The height of a group's row of merge marks; the ``merging`` groups share the lowest fifth of a panel."""
    return 0.03 + min(0.05, 0.17 / len(merging)) * merging.index(group) if group in merging else 0.0


def _zoom(whole: "Axes", zoomed: "Axes", drawings: Sequence[Drawing]) -> None:
    """Enlarges the end of the curves in the right panel and marks the region in the left; hides it for one curve."""
    start = parting([each.by_tokens for each in drawings])
    if start is None:
        zoomed.set_visible(False)
        return
    curves = [each.curve for each in drawings]
    left = min(float(np.interp(start, each.by_tokens.x, each.curve.x)) for each in drawings)
    right = max(each.x[-1] for each in curves)
    shown = [(each, each.x >= left) for each in curves if (each.x >= left).any()]
    low = min(each.low[inside].min() for each, inside in shown)
    high = max(each.high[inside].max() for each, inside in shown)
    margin = 0.05 * (high - low) or 0.01
    zoomed.set_xlim(left, right + 0.02 * (right - left))
    zoomed.set_ylim(low - margin, high + margin)
    whole.indicate_inset((left, low - margin, right - left, high - low + 2 * margin), edgecolor=GRAY)


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
