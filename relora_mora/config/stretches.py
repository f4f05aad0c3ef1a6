"""The steps that merge, in stretches of a run with intervals of their own."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated

from pydantic import Discriminator, Field, Tag

from relora_mora.config.types import Positive, Strict


class MergeStretch(Strict):
    """A part of a run with its own interval between merges; it begins where the one before it ends."""

    every: Positive = Field(description="merges follow the steps that are multiples of this, counted from step 0")
    until: Positive | None = Field(None, description="the last step of this stretch; null: to the end of the run")
    growth: Annotated[float, Field(ge=1.01, le=1000, allow_inf_nan=False)] | None = Field(
        None,
        description="each interval is this many times as long as the one before, rounded; the first has `every` steps "
        "from the beginning of the stretch; null: all have `every` steps",
    )


# One interval, or stretches. Only the faults of the form that was given are reported.
Intervals = Annotated[
    Annotated[Positive, Tag("interval")] | Annotated[list[MergeStretch], Field(min_length=1), Tag("stretches")],
    Discriminator(lambda value: "stretches" if isinstance(value, list) else "interval"),
]


def merge_steps(
    stretches: Sequence[MergeStretch], total: int, until: int | None, *, after: int = 0
) -> list[Sequence[int]]:
    """The steps of each stretch that merge in a run of ``total`` steps, up to ``until``; without the last step.

    There is no merge up to step ``after``, before the adapters begin.
    """
    last = total - 1 if until is None else min(until, total - 1)
    steps: list[Sequence[int]] = []
    begin = 0
    for stretch in stretches:
        end = last if stretch.until is None else min(stretch.until, last)
        if stretch.growth is None:
            steps.append(range((begin // stretch.every + 1) * stretch.every, end + 1, stretch.every))
        else:
            steps.append(_growing(begin, end, stretch.every, stretch.growth))
        begin = max(begin, end)
    return [group[bisect_right(group, after) :] for group in steps]


def _growing(begin: int, end: int, every: int, growth: float) -> list[int]:
    """The ends of intervals of every, every * growth, every * growth^2, ... steps."""
    steps = []
    step = begin + every
    length = float(every)
    while step <= end:
        steps.append(step)
        length *= growth
        step += round(length)
    return steps


def last_merge(steps: Sequence[Sequence[int]], step: int) -> int:
    """The last of the steps in :func:`merge_steps` up to ``step``; 0 if there is none."""
    return max((group[bisect_right(group, step) - 1] for group in steps if group and group[0] <= step), default=0)


def shortest_interval(steps: Sequence[Sequence[int]]) -> int | None:
    """The fewest steps between two merges, of those in :func:`merge_steps`; None if there is no second one."""
    groups = [group for group in steps if group]
    intervals = [second - first for group in groups for first, second in itertools.pairwise(group[:2])]
    intervals += [after[0] - before[-1] for before, after in itertools.pairwise(groups)]
    return min(intervals, default=None)
