"""Fixtures for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.tools import made_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """checkpoints/ with the steps 5, 10 and 15."""
    for step in (5, 10, 15):
        made_checkpoint(tmp_path / f"step-{step:08d}", step)
    return tmp_path
