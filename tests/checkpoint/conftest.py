"""Fixtures for the tests of checkpoints."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.tools import made_checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoints/ with the steps 5, 10 and 15, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    for step in (5, 10, 15):
        made_checkpoint(folder / f"step-{step:08d}", step)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made``."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)
