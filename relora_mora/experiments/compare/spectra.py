"""Singular values of the updates of several runs: a table and a figure."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relora_mora.adapters.layers import effective_rank
from relora_mora.experiments.compare.curves import figure_of_kinds, name_of, styles
from relora_mora.experiments.compare.figures import rank_figure
from relora_mora.experiments.compare.groups import Group
from relora_mora.experiments.compare.runs import Run
from relora_mora.experiments.spectrum import Spectra, spectra_by_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_columns(spectra: Sequence[Sequence[Spectra]], above: float) -> dict[str, list[str]]:
    """Columns of a table from the spectra of each group's runs, means over layers and seeds.

    Each kind of projection gets the effective rank and the number of singular values that are larger than ``above``.
    """

    def large(values: Tensor) -> Tensor:
        return (values > above).sum(-1)

    return {
        kind: [f"{_mean(group, kind, effective_rank):.0f}; {_mean(group, kind, large):.0f}" for group in spectra]
        for kind in spectra[0][0]
    }


def accumulated_figure(groups: Sequence[Group]) -> "Figure | None":
    """The effective rank of W - W_0 at each checkpoint that the runs have kept, means over layers; None without any.

    Raises the same errors as :func:`update_spectra`.
    """
    tag = "update/effective_rank"

    def measured(run: Run) -> Run:
        ranks = [
            {
                "step": step,
                **{f"{tag}/{kind}": float(effective_rank(values).mean()) for kind, values in spectra.items()},
            }
            for step, spectra in spectra_by_step(run.folder)
        ]
        return replace(run, lines=[*run.lines, *ranks])

    with_ranks = [replace(group, runs=tuple(measured(run) for run in group.runs)) for group in groups]
    return rank_figure(with_ranks, tag, "effective rank of W - W_0")


def _mean(group: Sequence[Spectra], kind: str, number: Callable[[Tensor], Tensor]) -> float:
    return float(number(_values(group, kind)).double().mean())


def _values(group: Sequence[Spectra], kind: str) -> Tensor:
    return torch.cat([spectra[kind] for spectra in group])  # [layers of all runs, n]


def spectrum_figure(groups: Sequence[Group], spectra: Sequence[Sequence[Spectra]]) -> "Figure":
    """One panel for each kind of projection: sorted singular values, means over layers and seeds."""
    kinds = list(spectra[0][0])
    with figure_of_kinds(kinds, groups, "singular value of W - W_0", sharex=False) as (figure, panels):
        for panel, kind in zip(panels.flat, kinds, strict=False):
            for group, of_runs, style in zip(groups, spectra, styles(), strict=False):
                values = _values(of_runs, kind).double().mean(0).tolist()
                places = range(1, len(values) + 1)
                panel.plot(places, values, label=name_of(group), **{**style, "markevery": max(1, len(values) // 6)})
            panel.set_yscale("log")
            panel.set_xlabel("index")
        largest = max(float(_values(of_runs, kind).max()) for of_runs in spectra for kind in kinds)
        panels[0][0].set_ylim(largest * 1e-4, largest * 2)  # smaller values are rounding errors
    return figure
