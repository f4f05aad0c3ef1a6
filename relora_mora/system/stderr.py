"""Messages on stderr that must not become faults of their own."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """A line on stderr, where that can be written: its reader may be gone, or its disk full."""
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # AttributeError: where it was closed, Python has None
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
