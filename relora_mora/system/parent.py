"""Processes that end with the one that started them, also where it is killed and can tell them nothing.

Run as a program it becomes another one, see :func:`ending_with_me`; so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int, number: int) -> None:
    """Has the kernel send this process a signal when its parent ends; it ends here where that has happened already.

    ``parent`` is the parent's pid. What counts is the thread that started this process. On Linux; the signal is kept
    over an exec (prctl(2)).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # gone before it could be watched
        os._exit(1)


def ending_with_me(arguments: Iterable[str]) -> list[str]:
    """The command line that runs Python with these arguments, and sends it SIGTERM when the caller of this ends."""
    return [sys.executable, "-P", __file__, str(os.getpid()), *arguments]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])  # noqa: S606
