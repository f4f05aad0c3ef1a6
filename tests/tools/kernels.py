"""What tests of kernels share."""

from __future__ import annotations

import os

import pytest
import torch

from relora_mora.kernels import cpu, ops

# tests/gpu runs these tests on a GPU, whose kernels are compiled at run time
COMPILED = os.environ.get("TEST_DEVICE", "cpu") != "cpu" or cpu.available()
compiled_only = pytest.mark.skipif(not COMPILED, reason=f"kernels are {ops.describe()}")
WITH_LIBRARY = (True, False) if COMPILED else (False,)


def integers(*shape: int, dtype: torch.dtype = torch.float32, bound: int = 255) -> torch.Tensor:
    """Integers whose sums are exact in float32 but need rounding in bfloat16 beyond 256."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
