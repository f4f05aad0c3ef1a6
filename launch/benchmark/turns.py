"""Measures several things in turns, so that other work on the machine affects all of them equally."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def take_turns(measures: Mapping[str, Callable[[], T]], *, rounds: int, warmup: int = 0) -> Iterator[dict[str, T]]:
    """Calls every measure once per round, in order, and yields the results by name.

    The first ``warmup`` rounds, which fill caches and compile, are not yielded.
    """
    for number in range(warmup + rounds):
        measured = {name: measure() for name, measure in measures.items()}
        if number >= warmup:
            yield measured


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:

    return {name: statistics.median(measured[name] for measured in rounds) for name in rounds[0]}


def relative_spread(values: Sequence[float]) -> float:
    """Half the interquartile range over the median; with fewer than four values, half the full range."""
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)
