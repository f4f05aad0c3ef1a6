"""Data next to the checkout that some tests need."""

from __future__ import annotations

import pytest

from tests.tools.helpers import ROOT

SHARED = ROOT.parent / "shared"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the shared test data is not beside the checkout ({SHARED.name}/)"
)
