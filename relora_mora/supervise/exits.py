"""How a run ends: stop signals, exit codes, and a line in the run folder.

The first stop signal asks for an orderly stop. A later one exits at once, whatever the main thread is doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from relora_mora.system.files import append_synced
from relora_mora.system.process import run_with_timeout
from relora_mora.system.run_folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Ctrl-C on a terminal reaches launcher and ranks, and the launcher passes it on: together they are one request
SAME_REQUEST_SECONDS = 1.0


class StopSignals:
    """Calls ``on_first(signal)`` and, for a signal more than a second later, ``on_second(signal)``, in its own thread.

    Python runs signal handlers between two bytecodes of the main thread, which may be in a collective for minutes. The
    interpreter's C handler, however, writes the number of the signal to the wakeup pipe at once, and a thread reads it.
    Waiting for blocked signals (sigwait) would need no pipe, but every child process would inherit the blocked signals.
    SIGHUP stays ignored where it is, as under nohup. Main thread only.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None], on_second: Callable[[signal.Signals], None]) -> None:
        self._on_first = on_first
        self._on_second = on_second
        self._first_at: float | None = None
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # without a Python handler nothing is written to the pipe
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), daemon=True, name="signals").start()

    def _read(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._received(signal.Signals(number))
        os.close(reader)

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self._on_first(number)
        elif now - self._first_at > SAME_REQUEST_SECONDS:
            self._on_second(number)

    def close(self) -> None:
        """Ignores signals from now on: how the process ends is decided."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self._writer)


FINISHED = 0
FAILED = 1
USER_ERROR = 2
# EX_UNAVAILABLE of sysexits.h: a rank, a launcher, a disk or the network is gone;
# the same command continues from the last checkpoint
LOST = 69
# EX_TEMPFAIL: stopped on request with everything saved; the same command continues from there
REQUEUE = 75

LAST_SECONDS = 3.0  # for the last words of a process that must end
STACKS_SECONDS = 1.0  # for a rank that hangs to write where it stands


def record_end(folder: Path, *, code: int, reason: str, rank: int, step: int | None) -> None:
    """Appends a line to ``ends.jsonl`` of the run folder. Where it cannot be written, the reason is on stderr only."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code,
        "reason": reason,
        "step": step,
        "rank": rank,
        "host": socket.gethostname(),
    }
    with contextlib.suppress(OSError):
        append_synced(RunFolder(folder).ends, json.dumps(entry))


def leave_process(code: int) -> NoReturn:
    """Exits with this code once the output is written, whatever the threads of the process do.

    An ordinary exit destroys the objects of libraries. Where another rank has exited a moment before, that of gloo or
    of the store can abort the process ("terminate called without an active exception"), and the code is lost.
    """
    _flush()
    os._exit(code)


def leave_now(code: int, *last_words: Callable[[], object], linger: float = 0.0) -> NoReturn:
    """Exits with this code, also where a pipe is full or a disk does not answer.

    ``last_words`` are called in this order and the output is flushed, as far as that gets within ``LAST_SECONDS``. Then
    it stays for ``linger`` seconds.
    """

    def speak() -> None:
        for words in last_words:
            with contextlib.suppress(Exception):  # the next ones are no less important
                words()
        _flush()

    run_with_timeout(LAST_SECONDS, speak)
    time.sleep(linger)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: closed at the start
            stream.flush()
