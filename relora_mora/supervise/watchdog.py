"""A thread of each rank that watches the other ranks through the job's key-value store, which works while a collective
hangs.

Every rank publishes heartbeats with its last action. The first rank reads those of all ranks, and the others read those
of the first rank. A rank that finds a failure (see :mod:`relora_mora.supervise.heartbeat`) publishes it. All ranks read
it and exit.
"""

import datetime
import faulthandler
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import DistError, PrefixStore, TCPStore

from relora_mora.supervise.exits import FAILED, LOST
from relora_mora.supervise.heartbeat import Heartbeat, PeerFailure, Received, find_hung, find_lost, lost
from relora_mora.system.process import run_with_timeout

HEARTBEAT_SECONDS = 1.0
STORE_SECONDS = 15.0  # for an answer of the store; if it takes longer, its host is gone
LEAVE_SECONDS = 5.0  # for a main thread to exit by itself after another rank has announced its exit
SILENT_SECONDS = 4.0  # without a heartbeat: a rank that does nothing else any more is gone
STACKS_SECONDS = 1.0  # for a rank that hangs to write the stacks of its threads
LINGER_SECONDS = 2.5  # for the others to read why the job ends, before the rank with the store exits


class _Action(NamedTuple):
    """The current action of the main thread."""

    name: str
    number: int
    begin: float
    limit_seconds: float


class Watchdog:
    """Publishes the heartbeats of one rank and watches other ranks. ``address`` is the address of the job's store.

    ``timeout_seconds`` is how long a rank may be silent or busy with one action; :meth:`begin` can allow more for an
    action. ``end(failure)`` is called from the thread and must not return. If this rank hangs, its stacks go to the
    file ``stacks``.
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
        # its own connection, because a client of the store serves one caller at a time
        store = TCPStore(
            *address, is_master=False, timeout=datetime.timedelta(seconds=STORE_SECONDS), wait_for_workers=False
        )
        self._store = PrefixStore(f"watchdog/{job}", store)
        self._store_lock = threading.Lock()
        self._asked_at: float | None = None  # set while a request to the store is unanswered
        self._interval = max(HEARTBEAT_SECONDS, world_size / 256)  # the store gets at most 256 heartbeats per second
        self.timeout_seconds = max(timeout_seconds, 3 * self._interval)
        self.linger_seconds = max(LINGER_SECONDS, 1.5 * self._interval)
        self._silent_seconds = max(SILENT_SECONDS, 3 * self._interval)
        self._known: PeerFailure | None = None  # the failure that was published
        self._action = _Action("started", 0, time.monotonic(), timeout_seconds)
        self._received: dict[int, Received] = {}
        self._heartbeats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self.beat()

    def start(self) -> None:
        """Begins to watch. Call it after the first heartbeat of all ranks."""
        self._thread.start()

    # ---- called by the main thread ----------------------------------------------------------------------------

    def begin(self, action: str, within: float | None = None) -> None:
        """The main thread begins an action, which may take ``within`` seconds or the timeout, whichever is longer.

        All ranks call this for the same actions in the same order.
        """
        limit = max(within or 0.0, self.timeout_seconds)
        self._action = _Action(action, self._action.number + 1, time.monotonic(), limit)

    def announce_exit(self, code: int, reason: str) -> None:
        """Announces to the other ranks that this one exits by itself."""
        self._publish(PeerFailure([self.rank], code, reason, announced=True))

    def diagnose(self, error: str) -> PeerFailure:
        """Finds the ranks at fault after a collective has failed: those whose heartbeats stop within a few seconds."""
        ranks = range(self.world_size)
        try:
            before = self._read(ranks)
            time.sleep(self._silent_seconds)
            after = self._read(ranks)
        except DistError:
            return self._store_lost()
        silent = {rank: last for rank, last in after.items() if last.number == before[rank].number}
        if silent:
            return self._publish(lost(silent, f"no heartbeat for {self._silent_seconds:.0f} s"))
        reason = f"a collective failed on rank {self.rank} while all ranks were alive ({error})"
        return self._publish(PeerFailure([self.rank], LOST, reason))

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(2 * STORE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    # ---- called by the guard's thread -------------------------------------------------------------------------

    def store_hung(self) -> PeerFailure | None:
        """A failure if the store has not answered for too long: a client waits forever if the first rank is stopped."""
        now = time.monotonic()
        asked_at = self._asked_at
        if asked_at is None or self._closed.is_set() or now - asked_at <= self.timeout_seconds:
            return None
        return self._first_lost(f"its store has not answered for {now - asked_at:.0f} s")

    # ---- the watchdog's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            # this thread needs the interpreter; if a C call blocks it, this timer in C ends the process
            faulthandler.dump_traceback_later(
                1.5 * max(self.timeout_seconds, self._action.limit_seconds) + 10, exit=True
            )
            self._asked_at = time.monotonic()
            try:
                self.beat()
                failure = self._find_failure()
            except DistError:
                failure = None if self._closed.is_set() else self._store_lost()
            except Exception as error:  # otherwise nobody would watch this rank any longer
                reason = f"rank {self.rank} cannot watch the others ({error!r})"
                failure = self._publish(PeerFailure([self.rank], FAILED, reason))
            self._asked_at = None
            if failure is not None:
                self._exit_for(failure)

    def _exit_for(self, failure: PeerFailure) -> None:
        """Ends this process, unless its main thread ends it by itself in time."""
        if self.rank in failure.ranks and not failure.announced:
            run_with_timeout(STACKS_SECONDS, self._write_stacks)  # the disk of the run folder may be what hangs
        grace = time.monotonic() + (LEAVE_SECONDS if failure.announced else 0.0)
        while time.monotonic() < grace:
            if self._closed.wait(0.1):
                return
        self.end(failure)

    def _write_stacks(self) -> None:
        with self.stacks.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)

    def beat(self) -> None:
        action = self._action
        with self._store_lock:
            self._heartbeats += 1
            heartbeat = Heartbeat(
                number=self._heartbeats,
                action=action.name,
                actions=action.number,
                action_seconds=time.monotonic() - action.begin,
                limit_seconds=action.limit_seconds,
            )
            self._store.set(f"heartbeat/{self.rank}", json.dumps(asdict(heartbeat)))

    def _find_failure(self) -> PeerFailure | None:
        """The failure that another rank has published, or one that this rank finds now."""
        with self._store_lock:
            if self._store.check(["failure"]):
                self._known = PeerFailure(**json.loads(self._store.get("failure")))
                return self._known
        now = time.monotonic()
        for rank, heartbeat in self._read(range(self.world_size) if self.rank == 0 else [0]).items():
            if rank not in self._received or self._received[rank].heartbeat.number != heartbeat.number:
                self._received[rank] = Received(heartbeat, now)
        failure = find_lost(self._received, self.timeout_seconds, now)
        if failure is None and self.rank == 0:
            failure = find_hung(self._received, self._silent_seconds, now)
        return None if failure is None else self._publish(failure)

    def _read(self, ranks: Sequence[int]) -> dict[int, Heartbeat]:
        """The last heartbeats of these ranks."""
        with self._store_lock:
            texts = self._store.multi_get([f"heartbeat/{rank}" for rank in ranks])
        return {rank: Heartbeat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}

    def _publish(self, failure: PeerFailure) -> PeerFailure:
        """Publishes a failure to all ranks. Returns the first one that was published, which counts for all of them."""
        try:
            with self._store_lock:
                first: Any = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
                self._known = PeerFailure(**json.loads(first))
                return self._known
        except DistError:
            return failure

    def _store_lost(self) -> PeerFailure:
        """The first rank, which holds the store, is gone. A failure that was published before is the reason."""
        return self._known or self._first_lost("the connection to it broke")

    def _first_lost(self, how: str) -> PeerFailure:
        last = self._received.get(0)
        return lost({0: last.heartbeat if last is not None else None}, how)
