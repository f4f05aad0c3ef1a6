"""Compiles and launches Triton kernels. Only files with kernels may import this one, because it imports Triton.

:func:`launch` checks only the arguments that change the compiled code, which takes less host time than
``kernel[grid](...)``: 7 us instead of 9, with Triton 3.7 and a driver that does nothing.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from relora_mora.kernels.cuda import OLDEST

_compiled: dict[Hashable, Any] = {}
_OPTIONS = {"enable_fp_fusion": True}  # adds products without rounding; set because Triton 3.10 changes the default


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether Triton works on this device; on a CPU it means Triton's interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    constants: dict[str, Any],
    *,
    warps: int = 4,
) -> None:
    """Runs ``grid`` programs of a kernel whose parameters are in this order: tensors, numbers, constants.

    The kernel is compiled for each set of constants and for each alignment of the pointers (16 bytes or less), which
    decides how much is loaded at once. Numbers must have 32 bits and be listed in the kernel's ``do_not_specialize``.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](*tensors, *numbers, **constants)
        return
    pointers = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    values = tuple(constants.values())
    with torch.cuda.device_of(tensors[0]):
        key = kernel, torch.cuda.current_device(), pointers, values, warps
        compiled = _compiled.get(key)
        if compiled is None:
            options = _OPTIONS | {"grid": grid, "num_warps": warps}
            compiled = _compiled[key] = kernel.warmup(*tensors, *numbers, **constants, **options)
        compiled[grid](*tensors, *numbers, *values)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
