"""Ctrl-C ends a command at once, also where Python's KeyboardInterrupt does not arrive."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from relora_mora.system.bounded import bounded
from relora_mora.system.new_folder import ENDINGS, remove_and_end, remove_unfinished
from relora_mora.system.stderr import say

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
GRACE_SECONDS = 3.0


class Interrupts:
    """While a command runs, SIGINT raises KeyboardInterrupt; where that does not end it in time, the process ends.

    Python runs its handler between two bytecodes of the main thread. A library may compute for minutes before the next
    one, and an import may swallow the exception. The handler in C, however, writes to a pipe at once, which a thread
    reads. Where the command sets a handler of its own, as the trainer does, this one does nothing.

    The thread also ends the process where a SIGTERM or SIGHUP does not in time, which ``new_folder`` handles.
    """

    def __init__(self) -> None:
        self.received = False
        self._ended = threading.Event()
        self._said = threading.Lock()  # taken by the first thread that says it
        self._writer: int | None = None

    def __enter__(self) -> Interrupts:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            signal.signal(signal.SIGINT, self._handle)
            signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._read, args=(reader,), daemon=True, name="interrupts").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._writer is None:
            return
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        of_the_command = signal.set_wakeup_fd(-1)
        if of_the_command not in (-1, self._writer):
            signal.set_wakeup_fd(of_the_command, warn_on_full_buffer=False)
        os.close(self._writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt

    def _read(self, reader: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # so that the main thread can block it for a while
        while numbers := os.read(reader, 64):
            if (
                signal.SIGINT in numbers
                and signal.getsignal(signal.SIGINT) == self._handle
                and not self._ended.wait(GRACE_SECONDS)
            ):
                bounded(GRACE_SECONDS, self.say)
                bounded(GRACE_SECONDS, remove_unfinished)
                os._exit(INTERRUPTED)
            for number in set(ENDINGS) & set(numbers):
                if signal.getsignal(number) is remove_and_end and not self._ended.wait(GRACE_SECONDS):
                    bounded(GRACE_SECONDS, remove_unfinished)
                    os._exit(128 + number)
        os.close(reader)

    def say(self) -> None:
        """Once, also where the main thread and this object's come to it at the same moment."""
        if self._said.acquire(blocking=False):
            say("interrupted")
