"""A flag that says whether this process is inside a collective. Any thread can read it without a lock.

The watchdog must not inspect stack frames instead: ``sys._current_frames()`` holds a lock of the interpreter while it
allocates memory, and a garbage collection that this starts can wait for the same lock (CPython gh-106883, in Python
3.11.7).
"""

import contextlib
from collections.abc import Iterator

_calls: set[object] = set()  # add and discard are atomic; calls may overlap


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Goes around every call that waits for other ranks."""
    call = object()
    _calls.add(call)
    try:
        yield
    finally:
        _calls.discard(call)


def in_collective() -> bool:
    """Whether a thread of this process waits for other ranks."""
    return bool(_calls)
