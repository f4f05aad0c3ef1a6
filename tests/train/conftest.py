"""Runs for tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.pool import Pools
from tests.tools.runs import Runs


@pytest.fixture
def runs(pools: Pools, inputs: Path, tokenizer_path: str) -> Runs:
    return Runs(pools, inputs, tokenizer_path)
