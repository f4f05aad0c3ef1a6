"""STOP_SIGNALS: the first asks for a stop, a later one exits at once, whatever the main thread does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

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
