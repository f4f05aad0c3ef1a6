"""How a run ends: exit codes, and a line about it in the run folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from relora_mora.system.bounded import bounded

FINISHED, FAILED, USER_ERROR = 0, 1, 2
LOST = 69  # EX_UNAVAILABLE of sysexits.h: a rank, a launcher or the network is gone; the same command goes on from the last checkpoint
REQUEUE = 75  # EX_TEMPFAIL: stopped on request with everything saved; the same command goes on from there


ENDS = "ends.jsonl"
LAST_SECONDS = 3.0  # for what a process that must end still has to say


def record_end(folder: Path, *, code: int, reason: str, rank: int, step: int | None) -> None:
    """Appends a line to ``ends.jsonl`` of the run folder; where that cannot be written, the reason is on stderr only."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code,
        "reason": reason,
        "step": step,
        "rank": rank,
        "host": socket.gethostname(),
    }
    with contextlib.suppress(OSError):
        handle = os.open(folder / ENDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, (json.dumps(entry) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def leave_process(code: int) -> NoReturn:
    """Ends the process with this code, whatever its threads do, when its output is written.

    A process that ends in the usual way destroys the objects of its libraries. Where another rank has gone a moment before,
    that of gloo or of the store can abort it ("terminate called without an active exception"), and the code is lost.
    """
    _flush()
    os._exit(code)


def leave_now(code: int, *last_words: Callable[[], object]) -> NoReturn:
    """Ends the process with this code, also where a pipe is full or a disk does not answer.

    ``last_words`` are said in this order, as far as they come within ``LAST_SECONDS``; the output is flushed after them.
    """

    def speak() -> None:
        for words in last_words:
            words()
        _flush()

    bounded(LAST_SECONDS, speak)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
