"""Figures of a comparison: losses, last perplexities, and ranks of merges."""

import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from relora_mora.config.schema import DECODER_LINEARS
from relora_mora.experiments.compare.curves import (
    GRAY,
    LETTERS,
    PAPER,
    curve,
    figure_of_kinds,
    paper_figure,
    set_ticks,
    state_of,
    styled,
)
from relora_mora.experiments.compare.groups import Group, common_steps
from relora_mora.experiments.compare.losses import loss_figure
from relora_mora.experiments.compare.runs import Run
from relora_mora.experiments.compare.table import common_sets, perplexities

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = "effective_rank"  # the name of the figure that not every comparison has
LABEL_LETTERS = 40  # in a line next to a panel


def figures_of(groups: Sequence[Group], against: Group | None = None) -> "dict[str, Figure]":
    """All figures of a comparison by name, with ranks if a run has merged."""
    figures = {"loss_by_tokens": loss_figure(groups, "tokens"), "loss_by_time": loss_figure(groups, "time")}
    figures["perplexity"] = perplexity_figure(groups, against)
    ranks = rank_figure(groups)
    if ranks is not None:
        figures[RANKS] = ranks
    return figures


def perplexity_figure(groups: Sequence[Group], against: Group | None = None) -> "Figure":
    """The last perplexity of each run as a dot and each group's mean as a stroke, in a panel for each held-out set.

    The group with the lowest perplexity on the last set is at the top. The dashed line is the mean of ``against``, by
    default the first group. If other groups are larger, the label of a group with one run says so.
    """
    sets = common_sets(groups)
    against = against or groups[0]
    rows = sorted(styled(groups), key=lambda each: np.mean(perplexities(each[0], sets[-1])))
    several = any(len(group.runs) > 1 for group in groups)
    labels = []
    for group, _ in rows:
        seeds = " (1 seed)" if several and len(group.runs) == 1 else ""
        labels.append(textwrap.fill(f"{group.label}{seeds}{state_of(group)}", LABEL_LETTERS))
    heights = np.array([label.count("\n") + 1.6 for label in labels])  # in lines
    places = np.cumsum(heights) - heights / 2
    line = textwrap.fill(f"dashed: {against.label}", LETTERS)
    with paper_figure(0.8 + 0.15 * (heights.sum() + line.count("\n"))) as figure:
        panels: Any = figure.subplots(1, len(sets), sharey=True, squeeze=False)
        for panel, name in zip(panels[0], sets, strict=True):
            reference = np.mean(perplexities(against, name))
            panel.axvline(reference, color=GRAY, linestyle="--", linewidth=1.0, zorder=1)
            for place, (group, style) in zip(places, rows, strict=True):
                values = perplexities(group, name)
                panel.plot(values, [place] * len(values), "o", color=style["color"], markerfacecolor="none")
                panel.plot(np.mean(values), place, "|", color=style["color"], markersize=11, markeredgewidth=1.5)
            panel.set_xlabel(f"perplexity on {name}" if name else "validation perplexity")
        panels[0][0].set_yticks(places, labels)
        panels[0][0].set_ylim(heights.sum(), 0)  # the first row at the top
        figure.supxlabel(line, fontsize=PAPER["axes.labelsize"])
    return figure


def rank_figure(
    groups: Sequence[Group], tag: str = "merge/effective_rank", title: str = "effective rank of a merge"
) -> "Figure | None":
    """Effective ranks in a panel for each kind of projection; None if no group has any.

    Ranks of a merge are measured in one layer in the middle of the model (docs/method.md).
    """
    measured = {
        kind: [group for group in groups if common_steps([run.series(f"{tag}/{kind}") for run in group.runs])]
        for kind in DECODER_LINEARS
    }
    kinds = [kind for kind in DECODER_LINEARS if measured[kind]]
    if not kinds:
        return None
    shown = [group for group in groups if any(group in of_kind for of_kind in measured.values())]
    with figure_of_kinds(kinds, shown, title, sharex=True) as (figure, panels):
        for panel, kind in zip(panels.flat, kinds, strict=False):
            for group, style in styled(groups):
                if group in measured[kind]:
                    curve(group, partial(Run.series, tag=f"{tag}/{kind}"), "tokens").draw(panel, group, style)
            panel.xaxis.set_tick_params(labelbottom=True)
            set_ticks(panel, "tokens", ticks=3)
        limits = [panel.dataLim for panel in panels.flat[: len(kinds)]]
        low, high = min(each.ymin for each in limits), max(each.ymax for each in limits)
        margin = 0.08 * (high - low) or 1.0
        panels[0][0].set_ylim(max(0.0, low - margin), high + margin)
        panels[0][0].set_xlim(left=0)
        for panel in panels.flat[max(0, len(kinds) - panels.shape[1]) : len(kinds)]:
            panel.set_xlabel("tokens")
    return figure
