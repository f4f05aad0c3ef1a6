"""The thread of each rank that watches the other ranks through the job's key-value store, which works while a
collective hangs.

Every rank publishes heartbeats. The first rank reads those of all, the others read the first rank's. Whoever finds a
rank at fault (see :mod:`relora_mora.supervise.heartbeat`) publishes that; all ranks read it and exit.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import DistError, PrefixStore, TCPStore

from relora_mora.distributed.waiting import in_collective
from relora_mora.supervise.exits import FAILED, LOST, STACKS_SECONDS
from relora_mora.supervise.heartbeat import Heartbeat, PeerFailure, Received, find_hung, find_silent, lost
from relora_mora.supervise.lock import host_id
from relora_mora.system.process import run_with_timeout

HEARTBEAT_SECONDS = 1.0
STORE_SECONDS = 15.0  # for an answer of the store; one that takes longer means that its host is gone
MOST_SECONDS = 2 * HEARTBEAT_SECONDS  # between two looks at a clock; more means that the process did not run
LEAVE_SECONDS = 5.0  # for a main thread to exit by itself after another rank has announced its exit
SUSPECT_SECONDS = 4.0  # to find the rank whose heartbeats stopped, when a collective has failed
LINGER_SECONDS = 2.5  # for the others to read why the rank that holds the store exits


class RunningClock:
    """Seconds in which this process ran: while a job is suspended it stands still.

    Some thread has to look at it all the time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._looked, MOST_SECONDS)
            self._looked = now
            return self._seconds


class _Action(NamedTuple):
    """What the main thread is doing."""

    name: str
    number: int
    begin: float  # by the watchdog's clock
    limit_seconds: float


class Watchdog:
    """Watches over one rank and, from it, over others. ``address`` is that of the job's store.

    ``timeout_seconds`` is how long a rank may be silent, or busy with one action; :meth:`begin` can allow more for an
    action. ``end(failure)`` is called from the thread and must not return. ``stacks`` is the file for the stacks of
    this rank when it hangs.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        *,
        address: tuple[str, int],
        job: str,
        end: Callable[[PeerFailure], None],
        stacks: Path,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.end = end
        self.stacks = stacks
        self._now = RunningClock()
        # a connection of its own: a client of the store answers one caller at a time
        store = TCPStore(
            *address, is_master=False, timeout=datetime.timedelta(seconds=STORE_SECONDS), wait_for_workers=False
        )
        self._store = PrefixStore(f"watchdog/{job}", store)
        self._store_lock = threading.Lock()
        self._asked_at: float | None = None  # while the store has not answered
        self._interval = max(HEARTBEAT_SECONDS, world_size / 256)  # 256 heartbeats a second at most, to spare the store
        self.timeout_seconds = max(timeout_seconds, 3 * self._interval)
        self.linger_seconds = max(LINGER_SECONDS, 1.5 * self._interval)
        self._known: PeerFailure | None = None  # that was published
        self._action = _Action("started", 0, self._now(), timeout_seconds)
        self._received: dict[int, Received] = {}
        self._heartbeats = 0
        self._closed = threading.Event()
        self._suspicious = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self.beat()

    def start(self) -> None:
        """Begins to watch; after the first heartbeat of all ranks."""
        self._thread.start()

    # ---- called by the main thread ----------------------------------------------------------------------------

    def begin(self, what: str, within: float | None = None) -> None:
        """The main thread begins an action, which may take ``within`` seconds where that is more than the timeout.

        All ranks call it for the same actions in the same order.
        """
        limit = max(within or 0.0, self.timeout_seconds)
        self._action = _Action(what, self._action.number + 1, self._now(), limit)

    def announce_exit(self, code: int, reason: str) -> None:
        """Tells the other ranks that this one exits by itself."""
        self._publish(PeerFailure(self.rank, code, reason, announced=True))

    def diagnose(self, error: str) -> PeerFailure:
        """Which rank is at fault, after a collective has failed. Waits a few seconds for heartbeats to stay away."""
        self._suspicious.set()
        deadline = time.monotonic() + self._suspect_seconds + 2 * self._interval
        while time.monotonic() < deadline:
            try:
                failure = self._find_failure()
            except DistError:
                return self._store_lost()
            if failure is not None:
                return failure
            time.sleep(self._interval / 4)
        reason = f"a collective failed on rank {self.rank} while all ranks were alive ({error})"
        return self._publish(PeerFailure(self.rank, LOST, reason, announced=False))

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(2 * STORE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    # ---- called by the guard's thread -------------------------------------------------------------------------

    def store_hung(self) -> PeerFailure | None:
        """That the store has not answered for too long: its client waits without end when the first rank is stopped."""
        now = self._now()
        asked_at = self._asked_at
        if asked_at is None or self._closed.is_set():
            return None
        seconds = now - asked_at
        return self._lost(0, f"nothing heard for {seconds:.0f} s") if seconds > self.timeout_seconds else None

    # ---- the watchdog's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            # this thread needs the interpreter: where a C call keeps it, a timer in C exits the process
            faulthandler.dump_traceback_later(
                1.5 * max(self.timeout_seconds, self._action.limit_seconds) + 10, exit=True
            )
            self._asked_at = self._now()
            try:
                self.beat()
                failure = self._find_failure()
            except DistError:
                failure = None if self._closed.is_set() else self._store_lost()
            except Exception as error:  # nobody would watch this rank any more
                reason = f"rank {self.rank} cannot watch the others ({error!r})"
                failure = self._publish(PeerFailure(self.rank, FAILED, reason, announced=False))
            self._asked_at = None
            if failure is not None:
                self._exit_for(failure)

    def _exit_for(self, failure: PeerFailure) -> None:
        """Ends this process, unless its main thread does so in time by itself."""
        if failure.rank == self.rank and not failure.announced:
            run_with_timeout(STACKS_SECONDS, self._write_stacks)  # what hangs may be the disk of the run folder
        grace = time.monotonic() + (LEAVE_SECONDS if failure.announced else 0.0)
        while time.monotonic() < grace:
            if self._closed.wait(0.1):
                return
        self.end(failure)

    def _write_stacks(self) -> None:
        with self.stacks.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)

    def beat(self) -> None:
        """Publishes a heartbeat."""
        action = self._action
        with self._store_lock:
            self._heartbeats += 1
            heartbeat = Heartbeat(
                number=self._heartbeats,
                action=action.name,
                actions=action.number,
                action_seconds=self._now() - action.begin,
                limit_seconds=action.limit_seconds,
                in_collective=in_collective(),
                host=host_id(),
                pid=os.getpid(),
            )
            self._store.set(f"heartbeat/{self.rank}", json.dumps(asdict(heartbeat)))

    def _find_failure(self) -> PeerFailure | None:
        """What another rank has published, or what is found here and now."""
        watches_all = self.rank == 0 or self._suspicious.is_set()
        with self._store_lock:
            if self._store.check(["failure"]):
                self._known = PeerFailure(**json.loads(self._store.get("failure")))
                return self._known
            self._receive(list(range(self.world_size)) if watches_all else [0, self.rank])
            others = {rank: last for rank, last in self._received.items() if rank != self.rank}
        now = self._now()
        allowed = self._suspect_seconds if self._suspicious.is_set() else self.timeout_seconds
        found = find_silent(others, allowed, now)
        if found is None and self.rank == 0:
            found = find_hung(self._received, now)
        return None if found is None else self._publish(found)

    def _receive(self, ranks: list[int]) -> None:
        now = self._now()
        texts = self._store.multi_get([f"heartbeat/{rank}" for rank in ranks])
        for rank, text in zip(ranks, texts, strict=True):
            heartbeat = Heartbeat(**json.loads(text))
            if rank not in self._received or self._received[rank].heartbeat.number != heartbeat.number:
                self._received[rank] = Received(heartbeat, now)

    def _publish(self, failure: PeerFailure) -> PeerFailure:
        """Tells all ranks of a failure, and returns the one that was published first: that one counts for all."""
        try:
            with self._store_lock:
                first: Any = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
                self._known = PeerFailure(**json.loads(first))
                return self._known
        except DistError:
            return failure

    @property
    def _suspect_seconds(self) -> float:
        return min(max(SUSPECT_SECONDS, 3 * self._interval), self.timeout_seconds)

    def _store_lost(self) -> PeerFailure:
        """The first rank, which holds the store, is gone: for the reason that was published before, or without one."""
        return self._known or self._lost(0, "the connection to it broke")

    def _lost(self, rank: int, how: str) -> PeerFailure:
        last = self._received.get(rank)
        return lost(rank, how, last.heartbeat if last is not None else None)
