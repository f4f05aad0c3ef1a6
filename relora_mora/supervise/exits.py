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
from relora_mora.system.files import append_synced
from relora_mora.system.run_folder import RunFolder

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

    bounded(LAST_SECONDS, speak)
    time.sleep(linger)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: closed at the start
            stream.flush()
