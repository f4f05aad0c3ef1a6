"""Things that may block for ever, done by who must not: a write to a full pipe, or to a disk that does not answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


def bounded(seconds: float, action: Callable[[], object]) -> None:
    """Does ``action`` in a thread of its own and returns when it is done, or after ``seconds`` whether it is done or not.

    An error of the action is dropped: whoever needs this has nobody left to tell.
    """

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True, name="bounded")
    with contextlib.suppress(RuntimeError):  # the machine has no more threads
        thread.start()
        thread.join(seconds)
