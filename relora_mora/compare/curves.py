"""Curves of a comparison: means over seeds against tokens or time, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from relora_mora.compare.groups import Group
from relora_mora.compare.runs import Run, Series

Axis = Literal["steps", "tokens", "time"]
Values = NDArray[np.float64]
VISIBLE = 0.4  # of the height of a zoomed panel that the last gap between curves fills


@dataclass(frozen=True)
class Curve:
    """A mean over seeds with the least and the greatest; all [n]. ``x`` is in steps, tokens or seconds."""

    steps: list[int]
    x: Values
    mean: Values
    low: Values
    high: Values


def curve(group: Group, series: Callable[[Run], Series], axis: Axis, *, smooth: bool = False) -> Curve:
    """A metric of a group at the steps that all its runs have; it may be empty.

    ``smooth``: each run's values become centred means over about a twenty-fifth of them.
    """
    found = [series(run) for run in group.runs]
    steps = group.common_steps(found)
    values = [np.array([each[step] for step in steps], dtype=float) for each in found]
    if smooth:
        values = [running_mean(each, max(1, len(steps) // 50)) for each in values]
    rows = np.stack(values)
    return Curve(steps, positions(group, steps, axis), rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))


def positions(group: Group, steps: Sequence[int], axis: Axis) -> Values:
    """Where steps stand on an axis: themselves, tokens trained on, or seconds of training, a mean over the runs."""
    if axis == "steps":
        return np.array(steps, dtype=float)
    if axis == "tokens":
        return group.runs[0].tokens(steps).astype(float)
    return np.mean([run.seconds(steps) for run in group.runs], axis=0)


def running_mean(values: Values, half: int) -> Values:
    """Centred means over 2 half + 1 values, over fewer near the ends: as many on either side."""
    reach = [min(half, index, len(values) - 1 - index) for index in range(len(values))]
    return np.array([values[index - near : index + near + 1].mean() for index, near in enumerate(reach)])


def parting(curves: Sequence[Curve]) -> float | None:
    """From where on a panel shows the curves apart: there the gap at the end fills a good part of its height.

    None where there are no two curves to tell apart.
    """
    curves = [each for each in curves if len(each.x) > 1]
    if len(curves) < 2:
        return None
    begin = max(each.x[0] for each in curves)
    end = min(each.x[-1] for each in curves)
    at_end = [float(np.interp(end, each.x, each.mean)) for each in curves]
    gap = max(at_end) - min(at_end)
    places = np.linspace(begin, end, 201)
    heights = np.max([np.interp(places, each.x, each.mean) for each in curves], axis=0) - min(at_end)
    shown = places[heights > gap / VISIBLE]
    start = float(shown[-1]) if len(shown) else float(begin)
    return min(max(start, begin + (end - begin) / 4), begin + (end - begin) * 3 / 4)
