"""What watches over one process of a run: signals, launchers, the other ranks, the lock of the run folder."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from relora_mora.supervise.exits import (
    LAST_SECONDS,
    LOST,
    REQUEUE,
    STACKS_SECONDS,
    USER_ERROR,
    StopSignals,
    leave_now,
    record_end,
)
from relora_mora.supervise.heartbeat import PeerFailure
from relora_mora.supervise.launchers import Launchers
from relora_mora.supervise.lock import RunLock, host_id
from relora_mora.system.process import run_with_timeout, say

if TYPE_CHECKING:
    from relora_mora.supervise.watchdog import Watchdog  # needs torch


LONG_SECONDS = 1800.0  # for `begin`: what building a model, a merge or the write of a checkpoint may take
LAUNCHER_SECONDS = 8.0  # to save and exit after the launcher has gone
POLL_SECONDS = 0.5


class Guard:
    """Made first of all in a process, so that it hears a signal during the imports as well. Main thread, one at a time.

    ``stop_reason`` is None until this process is asked to stop; the trainer looks at it once a step.
    """

    def __init__(self, rank: int = 0, *, signals: bool = True) -> None:
        self.stop_reason: str | None = None
        self.rank = rank
        self.step: int | None = None
        self._watchdog: Watchdog | None = None
        self._lock: RunLock | None = None
        self._folder: Path | None = None
        self._training = False
        self._decided: tuple[int, str] | None = None
        self._recording = threading.Lock()
        self._recorded = False
        self._ending = threading.Lock()  # taken, for good, by whoever ends the process
        self._closed = threading.Event()
        self._signals = StopSignals(self._first_signal, self._second_signal) if signals else None
        self._launchers = Launchers() if signals else None
        self._launcher_deadline: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="guard")
        self._thread.start()

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- called by the main thread ----------------------------------------------------------------------------

    def hold(self, lock: RunLock) -> None:
        """The first rank holds the lock of the run folder; ends are recorded there from now on."""
        self._lock = lock
        self.record_in(lock.path.parent)

    def record_in(self, folder: Path) -> None:
        """The run folder is this job's: how it ends is recorded there."""
        self._folder = folder

    @contextlib.contextmanager
    def bound(self, seconds: float, reason: str) -> Iterator[None]:
        """Ends the process where the block takes longer; for what is done before a watchdog watches."""
        leave = threading.Timer(
            seconds, leave_now, (LOST, lambda: self._say(reason), lambda: self.record(LOST, reason))
        )
        leave.daemon = True
        leave.start()
        try:
            yield
        finally:
            leave.cancel()

    def watch_peers(self, watchdog: Watchdog) -> None:
        """From now on the failure of another rank ends this process."""
        self._watchdog = watchdog
        self.rank = watchdog.rank
        watchdog.start()

    def begin(self, what: str, within: float | None = None) -> None:
        """See :meth:`Watchdog.begin`."""
        if self._watchdog is not None:
            self._watchdog.begin(what, within)

    def training(self) -> None:
        """From now on there is something to save: a signal no longer ends the process by itself."""
        self._training = True

    def record(self, code: int, reason: str) -> None:
        """Records the end of this run in its folder. The first call counts."""
        with self._recording:
            if self._folder is not None and not self._recorded:
                self._recorded = True
                record_end(self._folder, code=code, reason=reason, rank=self.rank, step=self.step)
                self._let_go()

    def _let_go(self) -> None:
        """The next start need not wonder what became of this one."""
        if self._lock is not None:
            self._lock.say_released()

    def announce_exit(self, code: int, reason: str, *, same_on_all_ranks: bool) -> None:
        """This rank exits with an error. The others need to hear of it, unless they exit with the same one."""
        if self.rank == 0 or not same_on_all_ranks:
            self.record(code, reason)
        if self._watchdog is not None and not same_on_all_ranks:
            self._watchdog.announce_exit(code, f"rank {self.rank} ended: {reason}")
            time.sleep(self._linger_seconds())

    def peer_failed(self, error: str) -> None:
        """A collective failed because another rank is gone: names that rank and ends the process."""
        if self._watchdog is not None:
            self.end(self._watchdog.diagnose(error))
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and not self._training:
            reason = f"another rank was lost at the start ({error})"
            leave_now(LOST, lambda: self._say(reason), lambda: self.record(LOST, reason))

    def machine_failed(self, reason: str, *, same_on_all_ranks: bool) -> NoReturn:
        """A device or disk has failed: ends this process and the others with the code that starts a job again."""
        if self.rank == 0 or not same_on_all_ranks:
            self._say(reason)
        self.announce_exit(LOST, reason, same_on_all_ranks=same_on_all_ranks)
        leave_now(LOST)

    def decide(self, code: int, reason: str) -> None:
        """The ranks have agreed on how the run ends, and all is written: nothing that happens from here on changes it.

        What is left to do is each rank's own, and may take long.
        """
        self._decided = code, reason
        self.stop_watching()
        self._record_decided()

    def stop_watching(self) -> None:
        """The work is done: from now on it is no fault when other ranks exit."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def close(self) -> None:
        self._closed.set()
        self.stop_watching()
        if self._lock is not None:
            self._lock.release()
        if self._signals is not None:
            self._signals.close()

    # ---- called by other threads ------------------------------------------------------------------------------

    def end(self, failure: PeerFailure) -> None:
        """Ends the process now, whatever its main thread waits for. The first rank that is left tells the user.

        Two threads may find out at the same moment: the first of them ends the process for both.
        """
        self._leave_if_decided()
        self._ending.acquire()
        run_with_timeout(LAST_SECONDS, lambda: self._report(failure))
        if failure.rank != self.rank and not failure.announced and failure.host == host_id():
            time.sleep(STACKS_SECONDS + 0.5)
            with contextlib.suppress(OSError):  # a launcher would wait half a minute for a process that does not answer
                os.kill(failure.pid, signal.SIGKILL)
        leave_now(failure.code, self._let_go, linger=self._linger_seconds())

    def _linger_seconds(self) -> float:
        """The first rank holds the store, where the others read why the job ends."""
        watchdog = self._watchdog  # the main thread may take it away
        return watchdog.linger_seconds if self.rank == 0 and watchdog is not None else 0.0

    def _report(self, failure: PeerFailure) -> None:
        """Said by the first rank; where that is lost, by the next one, and by the first of another host."""
        if self.rank not in ({1, _ranks_here()} if failure.rank == 0 else {0}):
            return
        self._say(failure.reason)
        if not failure.announced:  # otherwise that rank has recorded it
            self.record(failure.code, failure.reason)

    def folder_lost(self, who: str | None) -> None:
        """The run folder was removed or moved: saves into a new one, unless another trainer (``who``) has it now."""
        if who is None:
            self._ask_to_stop("the run folder was removed or moved")
            return
        self._leave_if_decided()
        reason = f"another trainer works in the run folder now ({who}): left without saving"
        leave_now(
            USER_ERROR,
            lambda: self._say(reason),
            lambda: self._tell_peers(USER_ERROR, reason),
            linger=self._linger_seconds(),
        )

    def _first_signal(self, number: signal.Signals) -> None:
        self._ask_to_stop(f"{number.name} to rank {self.rank}")

    def _second_signal(self, number: signal.Signals) -> None:
        self._leave_if_decided()
        reason = f"a second signal ({number.name}) to rank {self.rank}: left without saving"
        leave_now(128 + number, lambda: self._say(reason), lambda: self.record(128 + number, reason))

    def _leave_if_decided(self) -> None:
        if self._decided is not None:
            leave_now(self._decided[0], self._record_decided, linger=self._linger_seconds())

    def _record_decided(self) -> None:
        if self._decided is not None and self.rank == 0:
            self.record(*self._decided)

    def _ask_to_stop(self, reason: str) -> None:
        self.stop_reason = reason
        if self._training:
            return
        leave_now(
            REQUEUE,
            lambda: self._say(f"{reason} before the first step: nothing to save"),
            lambda: self.record(REQUEUE, reason),
            lambda: self._tell_peers(REQUEUE, reason),
            linger=self._linger_seconds(),
        )

    def _tell_peers(self, code: int, reason: str) -> None:
        watchdog = self._watchdog  # the main thread may take it away
        if watchdog is not None:
            watchdog.announce_exit(code, reason)

    def _run(self) -> None:
        """The guard's own thread, until it is closed."""
        while not self._closed.wait(POLL_SECONDS):
            watchdog = self._watchdog  # the main thread may take it away
            failure = watchdog.store_hung() if watchdog is not None else None
            if failure is not None:
                self.end(failure)
            if self._launchers is not None:
                self._check_launchers(self._launchers)

    def _check_launchers(self, launchers: Launchers) -> None:
        """Asks for a stop when a launcher is gone, and exits where that has not ended the process in time.

        Where a stop was asked for before, as by Ctrl-C, which ends launchers at once, there is nothing to add.
        """
        if self._launcher_deadline is None:
            gone = launchers.gone()
            if gone is not None and self.stop_reason is None:
                self._launcher_deadline = time.monotonic() + LAUNCHER_SECONDS
                self._ask_to_stop(f"the launcher of rank {self.rank} is gone ({gone})")
        elif time.monotonic() > self._launcher_deadline:
            self._leave_if_decided()
            reason = f"{self.stop_reason}; it could not be saved in {LAUNCHER_SECONDS:.0f} s"
            leave_now(LOST, lambda: self._say(reason), lambda: self.record(LOST, reason))

    def _say(self, text: str) -> None:
        prefix = f"[rank {self.rank}] " if self.rank else ""
        say(f"{prefix}the run ended: {text}")


def _ranks_here() -> int:
    from relora_mora.distributed.join import processes_on_host  # with torch, which a guard is made before

    return processes_on_host()
