"""Guards one process of a run: signals, launchers, the other ranks, the lock of the run folder."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from relora_mora.supervise import exits
from relora_mora.supervise.exits import STOP_SIGNALS, PeerFailure
from relora_mora.supervise.launchers import Launchers
from relora_mora.supervise.lock import RunLock
from relora_mora.system.logs import log
from relora_mora.system.process import WakeupPipe, run_with_timeout, say

if TYPE_CHECKING:
    from relora_mora.supervise.watchdog import Watchdog  # needs torch


LONG_SECONDS = 1800.0  # for `begin`: allowed for building a model, a merge or the write of a checkpoint
LAUNCHER_SECONDS = 8.0  # to save and exit after a launcher has ended
# Ctrl-C on a terminal reaches the ranks directly and through the launcher: both count as one request
SAME_REQUEST_SECONDS = 1.0
ANSWER_SECONDS = 0.5  # for a line that answers a signal, since nobody may read the log
POLL_SECONDS = 0.5


class Guard:
    """Created before anything else in a process, so that it also handles signals during the imports.

    Create it in the main thread, one at a time. ``stop_reason`` is None until this process is asked to stop. The
    trainer checks it once per step. A signal more than a second after the first one makes the process exit immediately,
    whatever its main thread is doing. If SIGHUP is ignored, as under nohup, it stays ignored.
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
        self._recorded = threading.Lock()  # taken by the first record, which counts
        self._ending = threading.Lock()  # taken by the thread that ends the process
        self._closed = threading.Event()
        self._asked_at: float | None = None  # when the first signal came
        self._signals: WakeupPipe | None = None
        if signals:
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, lambda *_: None)  # without a Python handler, C writes nothing to the pipe
            self._signals = WakeupPipe(self._on_signal, "signals")
        self._launchers = Launchers() if signals else None
        self._launcher_deadline: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="guard")
        self._thread.start()

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- called by the main thread ----------------------------------------------------------------------------

    def hold(self, lock: RunLock) -> None:
        """The first rank holds the lock of the run folder until this guard is closed."""
        self._lock = lock

    def record_in(self, folder: Path) -> None:
        """This job owns the run folder, so its end is recorded there."""
        self._folder = folder

    @contextlib.contextmanager
    def bound(self, seconds: float, reason: str) -> Iterator[None]:
        """Ends the process if the block takes longer; for work that begins before a watchdog watches."""
        leave = threading.Timer(seconds, self._leave, (exits.LOST, reason))
        leave.daemon = True
        leave.start()
        try:
            yield
        finally:
            leave.cancel()

    def watch_peers(self, watchdog: "Watchdog") -> None:
        """From now on, a failure of another rank ends this process."""
        self._watchdog = watchdog
        self.rank = watchdog.rank
        watchdog.start()

    def begin(self, action: str, within: float | None = None) -> None:
        """See :meth:`Watchdog.begin`."""
        if self._watchdog is not None:
            self._watchdog.begin(action, within)

    def training(self) -> None:
        """From now on there is state to save, so a signal no longer ends the process by itself."""
        self._training = True

    def record(self, code: int, reason: str) -> None:
        """Records the end of this run in its folder. Only the first call counts."""
        if self._folder is not None and self._recorded.acquire(blocking=False):
            exits.record_end(self._folder, code=code, reason=reason, rank=self.rank, step=self.step)

    def announce_exit(self, code: int, reason: str, *, same_on_all_ranks: bool) -> None:
        """This rank exits with an error. The others must know, unless they exit with the same error."""
        if self.rank == 0 or not same_on_all_ranks:
            self.record(code, reason)
        if self._watchdog is not None and not same_on_all_ranks:
            self._watchdog.announce_exit(code, f"rank {self.rank} ended: {reason}")
            time.sleep(self._linger_seconds())

    def peer_failed(self, error: str) -> None:
        """Ends the process after a collective failed because another rank is gone, once the first rank names that."""
        if self._watchdog is not None:
            self._watchdog.begin("waiting for the cause of a failed collective", failed=error)
            self._closed.wait()  # the watchdog ends the process
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and not self._training:
            self._leave(exits.LOST, f"another rank was lost at the start ({error})")

    def machine_failed(self, reason: str, *, same_on_all_ranks: bool) -> NoReturn:
        """Ends all ranks after a failure of a device or disk, with the code for which a job is started again."""
        if self.rank == 0 or not same_on_all_ranks:
            self._say(reason)
        self.announce_exit(exits.LOST, reason, same_on_all_ranks=same_on_all_ranks)
        exits.leave_now(exits.LOST)

    def decide(self, code: int, reason: str) -> None:
        """The ranks have agreed on how the run ends, and everything is written. Nothing can change this from now on.

        Each rank may still have work of its own, which can take long.
        """
        self._decided = code, reason
        self.stop_watching()
        self._record_decided()

    def stop_watching(self) -> None:
        """The work is done: from now on it is not a failure if other ranks exit."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def close(self) -> None:
        self._closed.set()
        self.stop_watching()
        if self._lock is not None:
            self._lock.release()
        if self._signals is not None:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # the end of the process is decided
            self._signals.close()

    # ---- called by other threads: each of these ends the process, whatever its main thread is waiting for ----------

    def end(self, failure: PeerFailure) -> None:
        """A rank has failed. The first rank reports it; if it is at fault itself, every rank does.

        The failure is recorded by the first rank, or else the second. A rank that announced its exit has done both.
        """
        first_failed = 0 in failure.ranks
        words: list[Callable[[], object]] = []
        if self.rank == 0 or (first_failed and not failure.announced):
            words.append(lambda: self._say(failure.reason))
        if self.rank == int(first_failed) and not failure.announced:
            words.append(lambda: self.record(failure.code, failure.reason))
        self._exit(failure.code, *words)

    def folder_lost(self, why: str) -> None:
        """The lock of the run folder was lost (see :class:`RunLock`), so this trainer must not write there any more."""
        code, reason = exits.USER_ERROR, "the run folder was removed or moved, or another trainer works in it now"
        if why == "refresh-failed":
            code, reason = exits.LOST, "the run folder's disk cannot be written"
        if self._decided is None:
            self._folder = None  # the end of this run is not recorded there
        self._leave(code, f"{reason}: exited without saving", announced=True)

    def _on_signal(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._request_stop(f"{name} to rank {self.rank}")
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            self._leave(128 + number, f"a second signal ({name}) to rank {self.rank}: exited without saving")

    def _request_stop(self, reason: str) -> None:
        self.stop_reason = reason
        if not self._training:
            self._leave(exits.REQUEUE, f"{reason} before the first step: nothing to save", announced=True)
        answer = "%s: stops after this step; a second signal exits without saving"
        run_with_timeout(ANSWER_SECONDS, lambda: log.info(answer, reason))

    def _leave(self, code: int, reason: str, *, announced: bool = False) -> NoReturn:
        """Says and records why this rank ends; if ``announced``, the other ranks end as well."""
        words: list[Callable[[], object]] = [lambda: self._say(reason), lambda: self.record(code, reason)]
        watchdog = self._watchdog  # the main thread may set it to None
        if announced and watchdog is not None:
            words.append(lambda: watchdog.announce_exit(code, reason))
        self._exit(code, *words)

    def _exit(self, code: int, *words: Callable[[], object]) -> NoReturn:
        """Ends the process, as was decided if it was. Of two threads that come here, the first one does."""
        self._ending.acquire()
        if self._decided is not None:
            code, words = self._decided[0], (self._record_decided,)
        exits.leave_now(code, *words, linger=self._linger_seconds())

    def _linger_seconds(self) -> float:
        """The first rank holds the store, in which the others read why the job ends."""
        watchdog = self._watchdog  # the main thread may set it to None
        return watchdog.linger_seconds if self.rank == 0 and watchdog is not None else 0.0

    def _record_decided(self) -> None:
        if self._decided is not None and self.rank == 0:
            self.record(*self._decided)

    def _run(self) -> None:
        """The guard's own thread, until it is closed."""
        while not self._closed.wait(POLL_SECONDS):
            watchdog = self._watchdog  # the main thread may set it to None
            failure = watchdog.store_hung() if watchdog is not None else None
            if failure is not None:
                self.end(failure)
            if self._launchers is not None:
                self._check_launchers(self._launchers)

    def _check_launchers(self, launchers: Launchers) -> None:
        """Requests a stop when a launcher has ended, and exits if the process has not ended in time after that.

        If a stop was requested before, this adds nothing: for example, Ctrl-C also ends launchers immediately.
        """
        if self._launcher_deadline is None:
            gone = launchers.gone()
            if gone is not None and self.stop_reason is None:
                self._launcher_deadline = time.monotonic() + LAUNCHER_SECONDS
                self._request_stop(f"the launcher of rank {self.rank} is gone ({gone})")
        elif time.monotonic() > self._launcher_deadline:
            self._leave(exits.LOST, f"{self.stop_reason}; the run was not saved within {LAUNCHER_SECONDS:.0f} s")

    def _say(self, text: str) -> None:
        prefix = f"[rank {self.rank}] " if self.rank else ""
        say(f"{prefix}the run ended: {text}")
