"""Threads of a process that does not have its cores to itself."""

from __future__ import annotations

import os

_SPINS = "3000"  # tens of microseconds; GNU's own number is a hundred times as many


def sleep_soon() -> None:
    """Makes OpenMP's threads sleep soon while they wait for each other, where the environment has no wish for that.

    By default they keep their cores busy meanwhile, and where another program has one of the cores that is the time of
    the thread that the others wait for (docs/performance.md). OpenMP reads this when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
