"""Imports that take seconds."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def many_imports() -> Iterator[None]:
    """Holds garbage collection back meanwhile.

    What is imported stays, but Python looks at all of it again and again: a fifth of the time that torch, transformers
    and DeepSpeed take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
