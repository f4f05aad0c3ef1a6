"""Kernels for NVIDIA's GPUs, written in Triton: whether there are any here, and their names. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch

from relora_mora.system.process import missing_to_compile

DTYPES = (torch.bfloat16, torch.float32)
# of a grouping: a kernel has code for each piece, and is compiled for 30 s with 90 of them, for 5 minutes with 500
MOST_PIECES = 128
OLDEST = (8, 0)  # compute capability of an A100: Triton supports none before


@functools.cache
def obstacle() -> str | None:
    """Why there are no kernels for CUDA devices here, None where there are. Does not start CUDA."""
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it beside torch"
    missing = missing_to_compile("C")
    return f"Triton compiles at run time, and {missing}" if missing else None


def describe() -> str:
    """What computes on the CUDA device in use, and why it is not Triton."""
    reason = obstacle()
    if reason is None and torch.cuda.get_device_capability() < OLDEST:
        reason = f"Triton needs a compute capability of {'.'.join(map(str, OLDEST))}"
    return f"torch: {reason}" if reason else "Triton"


def kernel(name: str) -> Callable[..., Any]:
    """The function of this name (``package.module:function``), imported when it is first called."""

    @functools.cache
    def function() -> Callable[..., Any]:
        found: Callable[..., Any] = resolve_name(name)
        return found

    return lambda *arguments: function()(*arguments)
