"""Kernels for NVIDIA's GPUs, written in Triton: whether they work here, and their names. Does not import Triton."""

import functools
import importlib.util
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch

from relora_mora.system.process import missing_to_compile

DTYPES = (torch.bfloat16, torch.float32)
# a kernel has code for each piece of a grouping: it compiles in 30 s with 90 pieces and in 5 minutes with 500
MOST_PIECES = 128
OLDEST = (8, 0)  # the compute capability of an A100; Triton does not support older ones


@functools.cache
def obstacle() -> str | None:
    """The reason why there are no kernels for CUDA devices here, or None if there are. Does not initialize CUDA."""
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it next to torch"
    missing = missing_to_compile("C")
    return f"Triton compiles at run time, and {missing}" if missing else None


def describe() -> str:
    """What computes on the current CUDA device, with the reason if it is not Triton."""
    reason = obstacle()
    if reason is None and torch.cuda.get_device_capability() < OLDEST:
        reason = f"Triton needs a compute capability of {'.'.join(map(str, OLDEST))}"
    return f"torch: {reason}" if reason else "Triton"


def kernel(name: str) -> Callable[..., Any]:
    """The function ``package.module:function``, imported at its first call."""
    function = functools.cache(lambda: resolve_name(name))
    return lambda *arguments: function()(*arguments)
