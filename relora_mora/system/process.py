"""This process: its threads, its memory, its parent, slow imports, and calls that may block."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal


def say(text: str) -> None:
    """A line on stderr, where that can be written: its reader may be gone, or its disk full."""
    # AttributeError: where it was closed, Python has None in its place
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def run_with_timeout(seconds: float, action: Callable[[], object]) -> None:
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


_SPINS = "3000"  # tens of microseconds; GNU's own number is a hundred times as many


def sleep_soon() -> None:
    """Makes OpenMP's threads sleep soon while they wait for each other, where the environment has no wish for that.

    By default they keep their cores busy meanwhile, and where another program has one of the cores that is the time of
    the thread that the others wait for (docs/performance.md). OpenMP reads this when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


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


def give_back_freed_memory() -> None:
    """Hands what is free now to the system, once: a start needs large pieces that no step asks for again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# variable that names one, and those that are looked for without it; torch.compile knows no other for C++
COMPILERS = {"C": ("CC", ("gcc", "clang")), "C++": ("CXX", ("g++",))}


def missing_to_compile(language: Literal["C", "C++"]) -> str | None:
    """What there is not, and the remedy; None where nothing is missing."""
    variable, names = COMPILERS[language]
    if given := os.environ.get(variable):
        names = (given,)
    if not any(map(shutil.which, names)):
        return f"there is no {language} compiler ({' or '.join(names)}); install one, or name it in {variable}"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"there is no Python.h in {headers}; install Python's headers (python3-dev)"
    return None
