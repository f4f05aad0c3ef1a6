"""What several tests use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the shared test data is not beside the checkout ({SHARED.name}/)"
)


@contextlib.contextmanager
def arithmetic_put_back() -> Iterator[None]:
    """Undoes what train.deterministic switches."""
    import torch

    with mock.patch.dict("os.environ"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def python_path() -> str:
    """PYTHONPATH with this checkout, and with what was there: packages may lie beside those of the interpreter."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
