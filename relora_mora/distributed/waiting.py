"""Whether this process is inside a collective: a flag around the calls, which any thread can look at without a lock.

The watchdog must not look at stack frames for that: ``sys._current_frames()`` holds a lock of the interpreter while it
allocates, and a garbage collection that this starts can wait for the same lock (CPython gh-106883, in Python 3.11.7).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_calls: set[object] = set()  # adding and discarding are atomic, and calls may overlap


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Around every call that waits for other ranks."""
    call = object()
    _calls.add(call)
    try:
        yield
    finally:
        _calls.discard(call)


def in_collective() -> bool:
    """Whether some thread of this process waits for other ranks."""
    return bool(_calls)
