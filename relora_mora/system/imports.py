"""Imports that take seconds."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from relora_mora.system.threads import sleep_soon


@contextlib.contextmanager
def many_imports() -> Iterator[None]:
    """Holds garbage collection back meanwhile, and has the threads that torch brings along wait without spinning long.

    What is imported stays, but Python looks at all of it again and again: a fifth of the time that torch, transformers
    and DeepSpeed take.
    """
    sleep_soon()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
