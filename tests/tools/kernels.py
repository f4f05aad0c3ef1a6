"""Marks for tests that need compiled kernels."""

from __future__ import annotations

import os

import pytest

from relora_mora import kernels

# tests/gpu runs these tests on a GPU, whose kernels are compiled at run time
compiled_only = pytest.mark.skipif(
    os.environ.get("TEST_DEVICE", "cpu") == "cpu" and not kernels.available(),
    reason=f"kernels are {kernels.describe()}",
)
