"""Fixtures of the tests of weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.adapter_tools import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    return save_base(tmp_path_factory.mktemp("base"))
