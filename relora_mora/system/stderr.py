"""Messages on stderr that must not become faults of their own."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """A line on stderr, where that can be written: its reader may be gone, or its disk full."""
    # AttributeError: where it was closed, Python has None in its place
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
