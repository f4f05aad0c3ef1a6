"""The figure of losses against tokens or time."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from relora_mora.experiments.compare.curves import (
    GRAY,
    Axis,
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
from relora_mora.experiments.compare.runs import Run
from relora_mora.experiments.compare.table import common_sets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MERGES = 25  # more merges of a run are not marked
TRAINING: Any = {"linewidth": 0.6}
MERGE: Any = {"linestyle": "", "marker": "|", "markersize": 5, "markeredgewidth": 1.2}


def loss_figure(groups: Sequence[Group], axis: Axis) -> "Figure":
    """Loss against tokens or time: a panel for each held-out set."""
    from matplotlib.lines import Line2D

    sets = common_sets(groups)
    merging = [group for group in groups if _marked_merges(group)]
    unit, title = unit_of(groups, axis)
    with paper_figure(2.6 * len(sets) + legend_height(groups)) as figure:
        panels: Any = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
        for panel, name in zip(panels, sets, strict=True):
            for group, style in styled(groups):
                losses = curve(group, partial(Run.evaluations, name=name), axis, unit)
                losses.draw(panel, group, style)
                if group in merging:
                    merges = [step for step in _marked_merges(group) if step <= losses.steps[-1]]
                    x = positions(group, merges, axis) / unit
                    heights = [_height_of_merges(merging.index(group), len(merging))] * len(merges)
                    panel.plot(x, heights, color=style["color"], transform=panel.get_xaxis_transform(), **MERGE)
            panel.set_xlabel(title)
            set_ticks(panel, axis)
            panel.set_ylabel(f"loss on {name}, nats per token" if name else "validation loss, nats per token")
            _draw_training(panel, groups, axis, unit)
        more = [Line2D([], [], color=GRAY, label="training, running mean", **TRAINING)]
        if merging:
            more.append(Line2D([], [], color=GRAY, label="merge", **MERGE))
        add_legend(figure, panels[0], groups, more)
    return figure


def _draw_training(panel: "Axes", groups: Sequence[Group], axis: Axis, unit: float) -> None:
    """Adds the training losses; those on a different kind of text may lie far outside and do not stretch the panel."""
    low, high = panel.get_ylim()
    for group, style in styled(groups):
        losses = curve(group, lambda run: run.series("train/loss"), axis, unit, smooth=True)
        panel.plot(losses.x, losses.mean, color=style["color"], alpha=0.6, zorder=1, **TRAINING)
    bottom, top = panel.get_ylim()
    panel.set_ylim(max(bottom, low - (high - low) / 2), min(top, high + (high - low) / 2))


def _marked_merges(group: Group) -> list[int]:
    """The steps of a group's merges; empty if there are too many to tell apart."""
    merges = group.runs[0].merges
    return merges if len(merges) <= MOST_MERGES else []


def _height_of_merges(row: int, rows: int) -> float:
    """The height of a row of merge marks, a fraction of the panel's; all rows share the lowest fifth of a panel."""
    return 0.03 + min(0.05, 0.17 / rows) * row
