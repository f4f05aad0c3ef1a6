"""Cases of a grid that take long together."""

from __future__ import annotations

from typing import Any

import pytest

STAGES = (0, 1, 2, 3)  # of ZeRO


def rest(*cases: Any) -> list[Any]:
    """Cases that ``make test-elastic`` runs, and ``make test`` leaves out: others have each of their values, here or in
    another test of the same code."""
    return [pytest.param(*case, marks=pytest.mark.elastic) for case in cases]
