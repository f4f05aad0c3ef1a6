"""Figures of comparisons, for print: losses, last perplexities and singular values."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from relora_mora.experiments.compare.groups import Group, common_sets, count

# Okabe and Ito's colors, which color-blind readers can tell apart; markers, of which there are more, also in grayscale
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
PAPER: Any = {"savefig.dpi": 300, "font.size": 9, "axes.grid": True, "grid.color": "#DDDDDD", "lines.markersize": 3.5}
WIDTH = 7.0  # inches, the text width of a page
LETTERS = 100  # in a line of this width
LABEL_LETTERS = 40  # in a line next to a panel
LINE = 0.15  # inches


def styles() -> Iterator[dict[str, Any]]:
    """Yields a color and a marker for each group, which has the same in all figures of a comparison."""
    for color, marker in zip(cycle(COLORS), cycle(MARKERS), strict=False):
        yield {"color": color, "marker": marker}


@matplotlib.rc_context(PAPER)
def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.05)
    return content.getvalue()


@matplotlib.rc_context(PAPER)
def loss_figure(groups: Sequence[Group]) -> Figure:
    """Validation loss against tokens in a panel for each held-out set: means, and a band from lowest to highest.

    The first evaluation is left out, because it would press the curves together.
    """
    sets = common_sets(groups)
    figure = _with_legend(2.6 * len(sets), [_caption(group, LETTERS) for group in groups])
    panels: Any = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for panel, name in zip(panels, sets, strict=True):
        for group, style in zip(groups, styles(), strict=False):
            losses = group.losses(name)
            losses = losses.iloc[min(1, len(losses) - 1) :]
            tokens = group.runs[0].tokens(losses.index)
            panel.plot(tokens, losses.mean(axis=1), markevery=-(-len(tokens) // 12), **style)
            panel.fill_between(tokens, losses.min(axis=1), losses.max(axis=1), color=style["color"], alpha=0.2)
        panel.set_xlabel("tokens trained on")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(lambda value, _: count(value))
        panel.set_ylabel(f"loss on {name}, nats per token" if name else "validation loss, nats per token")
    return figure


@matplotlib.rc_context(PAPER)
def perplexity_figure(groups: Sequence[Group], against: Group) -> Figure:
    """The last perplexity of each run as a dot and each group's mean as a stroke, in a panel for each held-out set.

    The group with the lowest perplexity on the last set is at the top. The dashed line is the mean of ``against``.
    """
    sets = common_sets(groups)
    rows = sorted(zip(groups, styles(), strict=False), key=lambda each: np.mean(each[0].perplexities(sets[-1])))
    labels = [_caption(group, LABEL_LETTERS) for group, _ in rows]
    row_height = LINE * (max(label.count("\n") for label in labels) + 1.6)
    figure = Figure(figsize=(WIDTH, 0.8 + row_height * len(rows)), layout="constrained")
    panels: Any = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, sets, strict=True):
        panel.axvline(np.mean(against.perplexities(name)), color="#777777", linestyle="--", linewidth=1.0, zorder=1)
        for place, (group, style) in enumerate(rows):
            values = group.perplexities(name)
            panel.plot(values, [place] * len(values), "o", color=style["color"], markerfacecolor="none")
            panel.plot(np.mean(values), place, "|", color=style["color"], markersize=11, markeredgewidth=1.5)
        panel.set_xlabel(f"perplexity on {name}" if name else "validation perplexity")
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row at the top
    figure.supxlabel(textwrap.fill(f"dashed: {against.label}", LETTERS), fontsize="medium")
    return figure


@matplotlib.rc_context(PAPER)
def spectrum_figure(runs: Sequence[str], spectra: Sequence[Mapping[str, Sequence[float]]]) -> Figure:
    """Each run's singular values, descending, in a panel for each kind of projection."""
    kinds = list(spectra[0])
    rows = -(-len(kinds) // 4)
    figure = _with_legend(1.8 * rows, [textwrap.fill(name, LETTERS) for name in runs])
    panels: Any = figure.subplots(rows, 4, sharey=True, squeeze=False)
    for panel, kind in zip(panels.flat, kinds, strict=False):
        for of_run, style in zip(spectra, styles(), strict=False):
            values = of_run[kind]
            panel.plot(range(1, len(values) + 1), values, markevery=max(1, len(values) // 6), **style)
        panel.set_title(kind)
        panel.set_yscale("log")
        panel.set_xlabel("index")
    for panel in panels.flat[len(kinds) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("singular value of W - W_0")
    largest = max(max(of_run[kind]) for of_run in spectra for kind in kinds)
    panels[0][0].set_ylim(largest * 1e-4, largest * 2)  # smaller values are rounding errors
    return figure


def _caption(group: Group, width: int) -> str:
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    state = f" [{group.state}]" if group.state else ""
    return textwrap.fill(f"{group.label}{seeds}{state}", width)


def _with_legend(height: float, names: Sequence[str]) -> Figure:
    """A figure with this height for panels, in inches, and a legend below it."""
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(WIDTH, height + 0.2 * (lines + 1)), layout="constrained")
    handles = [Line2D([], [], **style) for _, style in zip(names, styles(), strict=False)]
    figure.legend(handles, names, loc="outside lower center", handlelength=4)
    return figure
