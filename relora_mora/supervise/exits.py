"""The ends of a run: stop signals, exit codes, and a line in the run folder."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from relora_mora.system.files import append_synced
from relora_mora.system.process import run_with_timeout
from relora_mora.system.run_folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FINISHED = 0
FAILED = 1
USER_ERROR = 2
# EX_UNAVAILABLE of sysexits.h: a rank, launcher, disk or network was lost; the same command continues from the last
# checkpoint
LOST = 69
# EX_TEMPFAIL: stopped on request with everything saved; the same command continues from there
REQUEUE = 75


@dataclass(frozen=True)
class PeerFailure:
    """The reason why the whole job ends: the ranks at fault, the exit code for all ranks, and a sentence."""

    ranks: list[int]
    code: int
    reason: str
    announced: bool = False  # the rank exits by itself and has announced it


LAST_SECONDS = 3.0  # for the last messages and records of a process that must end


def record_end(folder: Path, *, code: int, reason: str, rank: int, step: int | None) -> None:
    """Appends a line to ``ends.jsonl`` of the run folder. If that fails, only stderr has the reason."""
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


def leave_now(code: int, *last_words: Callable[[], object], linger: float = 0.0) -> NoReturn:
    """Exits with this code, whatever the other threads are doing, even if a pipe is full or a disk does not answer.

    An ordinary exit destroys objects of libraries. If another rank has just exited, a destructor of gloo or the store
    can abort the process ("terminate called without an active exception"), and the exit code is lost.

    First it calls ``last_words`` in this order and flushes the output, but for ``LAST_SECONDS`` at most. Then it waits
    for ``linger`` seconds.
    """

    def speak() -> None:
        for words in last_words:
            with contextlib.suppress(Exception):  # the next calls matter just as much
                words()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: closed at the start
                stream.flush()

    run_with_timeout(LAST_SECONDS, speak)
    time.sleep(linger)
    os._exit(code)
