"""Fixtures of the tests of evaluation."""

from pathlib import Path

import pytest

from tests.evaluation.tools import ROWS
from tests.tools.data_tools import write_json_lines


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a file of rows for each local task."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in ROWS.items():
        write_json_lines(folder / f"{name.removeprefix('local_')}.jsonl", rows)
    return folder
