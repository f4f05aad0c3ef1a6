"""What watches over one process of a run: signals, launchers, the other ranks, the lock of the run folder."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from relora_mora.supervise.exits import LAST_SECONDS, LOST, REQUEUE, USER_ERROR, leave_now, record_end
from relora_mora.supervise.launchers import Launchers
from relora_mora.supervise.lock import RunLock, host_id
from relora_mora.supervise.signals import StopSignals
from relora_mora.system.bounded import bounded

if TYPE_CHECKING:
    from relora_mora.supervise.watchdog import PeerFailure, Watchdog

LONG_SECONDS = 1800.0  # for `begin`: what building a model, a merge or the write of a checkpoint may take
LAUNCHER_SECONDS = 8.0  # to save and end after the launcher has gone
LAUNCHER_POLL_SECONDS = 0.5
STACKS_SECONDS = 1.5  # for a rank that hangs to write where
LINGER_SECONDS = 2.5  # for the others to read why the rank that holds the store ends


class Guard:
    """Made first of all in a process, so that a signal during the imports is heard as well. Main thread, once at a time.

    ``stop_reason`` is None until somebody asks this process to stop; the trainer looks at it once a step.
    """

    def __init__(self, *, signals: bool = True) -> None:
        self.stop_reason: str | None = None
        self.rank = int(os.environ.get("RANK", "0"))
        self.step: int | None = None
        self._watch: Watchdog | None = None
        self._lock: RunLock | None = None
        self._folder: Path | None = None
        self._training = False
        self._ended = threading.Lock()  # taken by who records the end
        self._ending = threading.Lock()  # by who ends the process, for good
        self._closed = threading.Event()
        self._signals = StopSignals(self._first_signal, self._second_signal) if signals else None
        self._launchers = Launchers() if signals else None
        self._thread = threading.Thread(target=self._look_around, daemon=True, name="guard")
        self._thread.start()

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- of the main thread -----------------------------------------------------------------------------------

    def hold(self, lock: RunLock) -> None:
        """The first rank holds the lock of the run folder; ends are recorded there from now on."""
        self._lock, self._folder = lock, lock.path.parent

    def watch_peers(self, watch: Watchdog, folder: Path) -> None:
        """Another rank that is lost ends this process, and the reason goes to the run folder."""
        self._watch, self.rank = watch, watch.rank
        self._folder = folder
        watch.start()

    def begin(self, what: str, within: float | None = None) -> None:
        """See :meth:`Watchdog.begin`."""
        if self._watch is not None:
            self._watch.begin(what, within)

    def training(self) -> None:
        """From now on there is something to save: a signal no longer ends the process by itself."""
        self._training = True

    def record(self, code: int, reason: str) -> None:
        """The end of this run, in its folder. The first call counts."""
        if self._folder is not None and self._ended.acquire(blocking=False):
            record_end(self._folder, code=code, reason=reason, rank=self.rank, step=self.step)

    def announce_exit(self, code: int, reason: str, *, same_on_all_ranks: bool) -> None:
        """This rank ends with an error. The others need to hear of it, unless they end with the same one."""
        if self.rank == 0 or not same_on_all_ranks:
            self.record(code, reason)
        if self._watch is not None and not same_on_all_ranks:
            self._watch.announce_exit(code, f"rank {self.rank} ended: {reason}")
            if self.rank == 0:
                time.sleep(LINGER_SECONDS)

    def peer_failed(self, error: str) -> None:
        """A collective failed: another rank is gone. Names it and ends the process."""
        if self._watch is not None:
            self.end(self._watch.diagnose(error))

    def machine_failed(self, reason: str, *, same_on_all_ranks: bool) -> NoReturn:
        """Something of this machine has failed. Ends the process and the others with the code after which a job starts again."""
        if self.rank == 0 or not same_on_all_ranks:
            self._say(reason)
        self.announce_exit(LOST, reason, same_on_all_ranks=same_on_all_ranks)
        leave_now(LOST)

    def stop_watching(self) -> None:
        """The work is done: that other ranks end is no fault any more."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def close(self) -> None:
        self._closed.set()
        self.stop_watching()
        if self._lock is not None:
            self._lock.release()
        if self._signals is not None:
            self._signals.close()

    # ---- of other threads -------------------------------------------------------------------------------------

    def end(self, verdict: PeerFailure) -> None:
        """Ends the process now, whatever its main thread waits for. The first rank that is left tells the user.

        Two threads may find out at the same moment: the first of them ends the process for both.
        """
        self._ending.acquire()
        bounded(LAST_SECONDS, lambda: self._tell_end(verdict))
        if verdict.rank != self.rank and not verdict.left and verdict.host == host_id():
            time.sleep(STACKS_SECONDS)
            with contextlib.suppress(OSError):  # a launcher would wait half a minute for a process that does not answer
                os.kill(verdict.pid, signal.SIGKILL)
        leave_now(verdict.code)

    def _tell_end(self, verdict: PeerFailure) -> None:
        if self.rank != (1 if verdict.rank == 0 else 0):
            return
        self._say(verdict.reason)
        if not verdict.left:  # else that rank has recorded it
            self.record(verdict.code, verdict.reason)

    def folder_lost(self, who: str | None) -> None:
        """The run folder was removed or moved. What this run has is saved in a new one, unless another trainer (``who``) has begun there."""
        if who is None:
            self._ask_to_stop("the run folder was removed or moved")
            return
        reason = (
            f"the run folder was removed or moved, and another trainer works there now ({who}): left without saving"
        )
        leave_now(USER_ERROR, lambda: self._say(reason), lambda: self._tell_peers(USER_ERROR, reason))

    def _first_signal(self, number: signal.Signals) -> None:
        self._ask_to_stop(f"{number.name} to rank {self.rank}")

    def _second_signal(self, number: signal.Signals) -> None:
        reason = f"a second signal ({number.name}) to rank {self.rank}: left without saving"
        leave_now(128 + number, lambda: self._say(reason), lambda: self.record(128 + number, reason))

    def _ask_to_stop(self, reason: str) -> None:
        self.stop_reason = reason
        if self._training:
            return
        leave_now(
            REQUEUE,
            lambda: self._say(f"{reason} before the first step: nothing to save"),
            lambda: self.record(REQUEUE, reason),
            lambda: self._tell_peers(REQUEUE, reason),
        )

    def _tell_peers(self, code: int, reason: str) -> None:
        if self._watch is not None:
            self._watch.announce_exit(code, reason)

    def _look_around(self) -> None:
        """Launchers, and whether the watch itself is stuck, until the guard is closed."""
        deadline = None
        while not self._closed.wait(LAUNCHER_POLL_SECONDS):
            now = time.monotonic()
            verdict = self._watch.unanswered() if self._watch is not None else None
            if verdict is not None:
                self.end(verdict)
            gone = self._launchers.gone() if self._launchers is not None else None
            if gone is not None and deadline is None:
                deadline = now + LAUNCHER_SECONDS
                self._ask_to_stop(f"the launcher of rank {self.rank} is gone ({gone})")
            if deadline is not None and now > deadline:
                reason = f"{self.stop_reason}; it could not be saved in {LAUNCHER_SECONDS:.0f} s"
                leave_now(LOST, functools.partial(self.record, LOST, reason))

    def _say(self, text: str) -> None:
        prefix = f"[rank {self.rank}] " if self.rank else ""
        with contextlib.suppress(OSError, ValueError):  # the launcher's pipe may be closed
            sys.stderr.write(f"{prefix}the run ended: {text}\n")
            sys.stderr.flush()
