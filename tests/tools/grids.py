"""Cases of a grid: ``make test`` has all pairs of values, ``make test-elastic`` all triples."""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

STAGES = (0, 1, 2, 3)  # of ZeRO
ENOUGH = 1500  # random cases, among which are all pairs of a grid (tests/grid/test_covering.py)
Case = dict[str, Any]


def rest(*cases: Any, mark: str = "more") -> list[Any]:
    """Cases whose values are in others, too: ``make test`` leaves out those marked ``more``, and ``make test-stops
    SHORT=1`` those marked ``long``."""
    return [pytest.param(*case, marks=getattr(pytest.mark, mark)) for case in cases]


def covering(cases: Sequence[Case], together: int) -> list[Case]:
    """A few of the cases, in which any values of ``together`` settings that occur together in some case occur together.

    Greedy: the next case is the one with the most combinations that no chosen case has.
    """
    numbers: dict[tuple[tuple[str, Any], ...], int] = {}
    masks = [_mask(case, together, numbers) for case in cases]
    left = (1 << len(numbers)) - 1
    chosen = []
    while left:
        new = [(mask & left).bit_count() for mask in masks]
        best = new.index(max(new))
        chosen.append(cases[best])
        left &= ~masks[best]
    return chosen


def _mask(case: Case, together: int, numbers: dict[tuple[tuple[str, Any], ...], int]) -> int:
    """A bit for each combination of ``together`` values in the case; unseen combinations get the next numbers."""
    mask = 0
    for combination in itertools.combinations(case.items(), together):
        mask |= 1 << numbers.setdefault(combination, len(numbers))
    return mask


def grid(valid: Callable[[Case], bool], values: Mapping[str, Iterable[Any]]) -> list[Any]:
    """All valid combinations of the values, covered: parameters of a test that takes a ``case``.

    Cases with all pairs come first; those that all triples need in addition only run in ``make test-elastic``.
    """
    product = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    cases = [case for case in product if valid(case)]
    cases = random.Random(0).sample(cases, min(len(cases), ENOUGH))  # among all of them the search would take seconds
    pairs = covering(cases, 2)
    triples = [case for case in covering(cases, 3) if case not in pairs]
    return [
        pytest.param(case, id="-".join(map(str, case.values())), marks=marks)
        for chosen, marks in ((pairs, ()), (triples, pytest.mark.elastic))
        for case in chosen
    ]
