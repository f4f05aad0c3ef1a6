"""Measures several things in turns, so that other work on the machine affects all of them equally."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def say(text: str) -> None:
    """Prints a line of progress immediately; the tables on stdout stay as they are."""
    print(text, file=sys.stderr, flush=True)


def take_turns(
    measures: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    warmup: int = 0,
    note: Callable[[str], object] = lambda text: None,
) -> Iterator[dict[str, T]]:
    """Calls every measure once per round, in order, and yields the results by name.

    The first ``warmup`` rounds, which fill caches and compile, are not yielded. ``note`` gets a line for each round.
    """
    for number in range(1, warmup + rounds + 1):
        begin = time.monotonic()
        measured = {name: measure() for name, measure in measures.items()}
        note(f"round {number} of {warmup + rounds}: {time.monotonic() - begin:.1f} s")
        if number > warmup:
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
