"""What tests of kernels share."""

import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from relora_mora.kernels import cpu, ops

T = TypeVar("T")

# tests/gpu runs these tests on a GPU, whose kernels are compiled at run time
ON_GPU = os.environ.get("TEST_DEVICE", "cpu") != "cpu"
gpu_only = pytest.mark.skipif(not ON_GPU, reason="it is about GPUs, and TEST_DEVICE=cpu")
COMPILED = ON_GPU or cpu.available()
compiled_only = pytest.mark.skipif(not COMPILED, reason=f"kernels are {ops.describe()}")
WITH_LIBRARY = (True, False) if COMPILED else (False,)


def integers(*shape: int, dtype: torch.dtype = torch.float32, bound: int = 255) -> torch.Tensor:
    """Integers whose sums are exact in float32 but need rounding in bfloat16 beyond 256."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def on_all_threads(compute: Callable[[], T]) -> list[T]:
    """The results for several numbers of threads, and for each instruction set."""
    threads = torch.get_num_threads()
    results = []
    try:
        for number, instructions in ((1, cpu.BEST), (2, cpu.BEST), (5, cpu.BEST), (5, 1), (5, 0)):
            torch.set_num_threads(number)
            cpu.load().remora_use(instructions)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
        cpu.load().remora_use(cpu.BEST)
    return results
