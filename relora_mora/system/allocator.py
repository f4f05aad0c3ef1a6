"""Memory of a process on a CPU: kept once the system has given it, since every step asks for the same again."""

from __future__ import annotations

import contextlib
import ctypes
import os

_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# parameters of mallopt in glibc's malloc.h
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to hand no memory back to the system; returns whether that was done.

    By default malloc gets a large block from mmap and returns it with munmap, so each new tensor costs a page fault
    every 4 KiB: a seventh of a training step's processor time (docs/performance.md). The price: what was in use at the
    peak stays with the process. Does nothing with another C library, or where the environment has settings for malloc.
    """
    if any(name in os.environ for name in _SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.gnu_get_libc_version and libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))
    return False
