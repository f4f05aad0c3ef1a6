"""Data next to the checkout, and packages, that some tests need."""

import importlib.util

import pytest

from tests.tools.helpers import ROOT

SHARED = ROOT.parent / "shared"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the shared test data is not next to the checkout ({SHARED.name}/)"
)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'relora_mora[eval]'"
)
