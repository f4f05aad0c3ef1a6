"""Singular values of the updates of several runs: a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relora_mora.compare.figures import PAPER, WIDTH, add_legend, legend_height, styles
from relora_mora.compare.groups import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = NDArray[np.float64]
Spectra = Mapping[str, Sequence[Values]]  # singular values of each layer, descending, by the kind of projection


def effective_rank(values: Values) -> float:
    """exp of the entropy of the normalized singular values [n] (Roy & Vetterli 2007, eq. 2-3); 0 where all are 0"""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rank_columns(spectra: Sequence[Sequence[Spectra]], above: float) -> dict[str, list[str]]:
    """Columns of a table, from the spectra of each group's runs: means over layers and seeds.

    For each kind of projection the effective rank, and how many singular values are above ``above``.
    """
    columns: dict[str, list[str]] = {}
    for kind in spectra[0][0]:
        columns[kind] = [
            f"{_mean(group, kind, effective_rank):.0f}; {_mean(group, kind, lambda s: float((s > above).sum())):.0f}"
            for group in spectra
        ]
    return columns


def _mean(group: Sequence[Spectra], kind: str, number: Any) -> float:
    return float(np.mean([number(values) for spectra in group for values in spectra[kind]]))


def spectrum_figure(groups: Sequence[Group], spectra: Sequence[Sequence[Spectra]]) -> Figure:
    """A panel for each kind of projection: singular values in their order, means over layers and seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    kinds = list(spectra[0][0])
    rows = -(-len(kinds) // 4)
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(WIDTH, 1.8 * rows + legend_height(groups)), layout="constrained")
        panels: Any = figure.subplots(rows, min(4, len(kinds)), sharey=True, squeeze=False)
        for panel, kind in zip(panels.flat, kinds, strict=False):
            panel.set_title(kind)
            for group, of_runs, style in zip(groups, spectra, styles(), strict=False):
                values = np.mean([each for run in of_runs for each in run[kind]], axis=0)
                places = np.arange(1, len(values) + 1)
                panel.plot(places, values, label=group.label, **{**style, "markevery": max(1, len(values) // 6)})
            panel.set_yscale("log")
            panel.set_xlabel("number")
        for panel in panels.flat[len(kinds) :]:
            panel.set_visible(False)
        for panel in panels[:, 0]:
            panel.set_ylabel("singular value")
        largest = max(
            values.max() for of_runs in spectra for run in of_runs for each in run.values() for values in each
        )
        panels[0][0].set_ylim(largest * 1e-4, largest * 2)  # what is below is rounding
        add_legend(figure, panels[0][0], groups)
    return figure
