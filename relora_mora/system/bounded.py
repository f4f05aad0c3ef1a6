"""Actions that may block for ever, such as a write to a full pipe, for callers that must not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


def bounded(seconds: float, action: Callable[[], object]) -> None:
    """Runs ``action`` in a thread of its own and returns when it has ended, or after ``seconds`` at the latest.

    An error of the action is dropped: a caller that needs this has nobody left to tell.
    """

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True, name="bounded")
    with contextlib.suppress(RuntimeError):  # the machine has no more threads
        thread.start()
        thread.join(seconds)
