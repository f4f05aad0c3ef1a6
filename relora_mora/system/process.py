"""This process: its threads, signals, memory, parent and slow imports, and calls that may block."""

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
    """Writes a line to stderr if possible; its reader may be gone, or its disk full."""
    # AttributeError: sys.stderr is None if stderr was closed at the start
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def run_with_timeout(seconds: float, action: Callable[[], object]) -> None:
    """Runs ``action`` in a thread of its own and returns when it ends, or after ``seconds`` at the latest.

    An error of the action is dropped: a caller that needs this function cannot report it to anyone.
    """

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True, name="bounded")
    with contextlib.suppress(RuntimeError):  # the machine has no threads left
        thread.start()
        thread.join(seconds)


class WakeupPipe:
    """Calls ``on_signal(number)`` in a thread of its own as soon as a signal arrives that has a handler in Python.

    Python runs signal handlers between two bytecodes of the main thread, which may be in a library for minutes. But the
    interpreter's C handler writes the number of the signal to the wakeup pipe immediately, and the thread reads it. A
    process has one such pipe: a new one takes the place of the one before. Main thread only.
    """

    def __init__(self, on_signal: Callable[[int], None], name: str) -> None:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader, on_signal), daemon=True, name=name).start()

    def _read(self, reader: int, on_signal: Callable[[int], None]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # so that the main thread can defer it by blocking it
        while numbers := os.read(reader, 64):
            for number in numbers:
                on_signal(number)
        os.close(reader)

    def close(self) -> None:
        current = signal.set_wakeup_fd(-1)
        if current not in (-1, self._writer):  # a newer pipe
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        os.close(self._writer)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int, number: int) -> None:
    """Makes the kernel send this process a signal when its parent ends; exits if the parent has already ended.

    ``parent`` is the parent's pid. The kernel watches the thread that started this process. Linux only; the setting
    survives an exec (prctl(2)).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # gone before it could be watched
        os._exit(1)


def ending_with_me(arguments: Iterable[str]) -> list[str]:
    """A command line that runs Python with these arguments and sends it SIGTERM when the calling process ends."""
    return [sys.executable, "-P", __file__, str(os.getpid()), *arguments]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])  # noqa: S606


def own_command() -> str:
    """How a shell starts ``relora-mora`` of this environment."""
    found = shutil.which("relora-mora")
    python = Path(sys.executable)
    if found is not None and Path(found).parent == python.parent:
        return "relora-mora"
    return f"{python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python} -m relora_mora"


@contextlib.contextmanager
def many_imports() -> Iterator[None]:
    """Turns off garbage collection during slow imports, and makes OpenMP's idle threads sleep soon.

    Imported modules stay, but Python scans them again and again, which is a fifth of the time that importing torch,
    transformers and DeepSpeed takes; they are left out of later scans, too. On a terminal a line shows immediately that
    the command has begun.

    By default, OpenMP's threads spin while they wait for each other. If another program uses one of the cores, that
    takes time from the thread that the others wait for (docs/performance.md). OMP_WAIT_POLICY in the environment wins.
    """
    from relora_mora.system.bars import Bar  # this file is also a script, which runs without the package

    if "OMP_WAIT_POLICY" not in os.environ:
        # read when torch is imported; tens of microseconds, and GNU's default is a hundred times as many
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with Bar("loading libraries", after=0.0):
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


# parameters of mallopt in glibc's malloc.h
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Makes glibc's malloc return no memory to the system.

    By default malloc takes a large block from mmap and returns it with munmap, so each new tensor costs a page fault
    every 4 KiB: a seventh of a training step's processor time (docs/performance.md). The price is that the process
    keeps its peak memory. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Returns freed memory to the system once: a start needs large pieces that no step asks for again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# the environment variable that names the compiler, and the defaults; torch.compile knows no other one for C++
COMPILERS = {"C": ("CC", ("gcc", "clang")), "C++": ("CXX", ("g++",))}


def missing_to_compile(language: Literal["C", "C++"]) -> str | None:
    """What is missing and the remedy; None if nothing is missing."""
    variable, names = COMPILERS[language]
    if chosen := os.environ.get(variable):
        names = (chosen,)
    if not any(map(shutil.which, names)):
        return f"no {language} compiler ({' or '.join(names)}) was found; install one, or name it in {variable}"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"{headers} has no Python.h; install Python's headers (python3-dev)"
    return None
