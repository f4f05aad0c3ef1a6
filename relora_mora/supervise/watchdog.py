"""A thread of each rank that watches the other ranks through the job's key-value store, which works while a collective
hangs.

Every rank publishes heartbeats with its last action. The first rank reads those of all ranks and decides which ranks
are at fault; the others read those of the first rank. A failure is published, and all ranks that read it exit.

The ranks do the same actions in the same order. So among ranks that make no progress, those that have begun the fewest
actions are named. A rank that sends no heartbeats comes before them: it is gone, and the others wait for it.
"""

import contextlib
import datetime
import faulthandler
import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

from relora_mora.supervise.exits import FAILED, LOST, PeerFailure
from relora_mora.system.process import run_with_timeout

HEARTBEAT_SECONDS = 1.0
STORE_SECONDS = 15.0  # for an answer of the store; if it takes longer, its host is gone
LEAVE_SECONDS = 5.0  # for a main thread to exit by itself after another rank has announced its exit
SILENT_SECONDS = 4.0  # without a heartbeat: a rank for which others wait is gone
STACKS_SECONDS = 1.0  # for a rank that hangs to write the stacks of its threads
LINGER_SECONDS = 2.5  # for the others to read why the job ends, before the rank with the store exits


@dataclass(frozen=True)
class Heartbeat:
    """The message that a rank sends to the others about once a second."""

    action: str  # the last action that the main thread began
    actions: int  # how many actions it has begun
    action_seconds: float  # since it began the last one
    limit_seconds: float  # allowed for the last one
    failed: str = ""  # the error of the last one, if it was a collective that has failed


def find_failure(
    heartbeats: Mapping[int, Heartbeat], silent: Mapping[int, float], timeout_seconds: float, silent_seconds: float
) -> PeerFailure | None:
    """The ranks at fault, by the last heartbeats of all ranks and the seconds since these came; None if all is well.

    Without a heartbeat, a rank is gone after ``timeout_seconds``, or after ``silent_seconds`` if a collective has
    failed or a rank exceeds the limit of its action. A rank that has begun more actions than another may exceed its
    limit, because it waits for the other one.
    """
    seconds = {rank: last.action_seconds + silent[rank] for rank, last in heartbeats.items()}
    least = min(last.actions for last in heartbeats.values())
    slowest = [rank for rank, last in heartbeats.items() if last.actions == least]
    late = max(slowest, key=lambda rank: seconds[rank] - heartbeats[rank].limit_seconds)
    is_late = seconds[late] > heartbeats[late].limit_seconds
    failed = next((rank for rank, last in heartbeats.items() if last.failed), None)
    allowed = silent_seconds if is_late or failed is not None else timeout_seconds
    gone = {rank: heartbeats[rank] for rank in heartbeats if silent[rank] > allowed}
    if gone:
        return are_gone(gone, f"no heartbeat for {allowed:.0f} s")
    if is_late:
        reason = f"{_named(slowest)} made no progress for {seconds[late]:.0f} s; last action: {heartbeats[late].action}"
        allows = f"train.peer_timeout_seconds allows {heartbeats[late].limit_seconds:.0f} s"
        return PeerFailure(slowest, LOST, f"{reason}; {allows}")
    if failed is not None and seconds[failed] > 2 * silent_seconds:
        error = heartbeats[failed].failed
        return PeerFailure([failed], LOST, f"a collective failed on rank {failed} while all ranks were alive ({error})")
    return None


def are_gone(last: Mapping[int, Heartbeat | None], how: str) -> PeerFailure:
    """The failure of ranks that no longer answer; their last heartbeats, None if none has arrived."""
    arrived = [heartbeat for heartbeat in last.values() if heartbeat is not None]
    least = min(arrived, key=lambda heartbeat: heartbeat.actions, default=None)
    action = f"; last action: {least.action}" if least is not None else ""
    verb = "is" if len(last) == 1 else "are"
    return PeerFailure(list(last), LOST, f"{_named(last)} {verb} gone ({how}){action}")


def _named(ranks: Collection[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


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
        self.end = end
        self.stacks = stacks
        self._watched = range(world_size) if rank == 0 else range(1)
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
        self._known: PeerFailure | None = None  # the failure that was published
        self._action = Heartbeat("started", 0, 0.0, self.timeout_seconds), time.monotonic()  # and when it began
        self._last: dict[int, Heartbeat] = {}
        self._arrived: dict[int, float] = {}  # when they came by the clock of this rank
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._beat()

    def start(self) -> None:
        """Begins to watch. Call it after the first heartbeat of all ranks."""
        self._thread.start()

    # ---- called by the main thread ----------------------------------------------------------------------------

    def begin(self, action: str, within: float | None = None, failed: str = "") -> None:
        """The main thread begins an action, which may take ``within`` seconds or the timeout, whichever is longer.

        All ranks call this for the same actions in the same order. ``failed`` is the error of a collective: from then
        on, the main thread waits for the first rank to find out which rank is gone.
        """
        limit = max(within or 0.0, self.timeout_seconds)
        before, _ = self._action
        self._action = Heartbeat(action, before.actions + 1, 0.0, limit, failed), time.monotonic()

    def announce_exit(self, code: int, reason: str) -> None:
        """Announces to the other ranks that this one exits by itself."""
        self._publish(PeerFailure([self.rank], code, reason, announced=True))

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
        return are_gone({0: self._last.get(0)}, f"its store has not answered for {now - asked_at:.0f} s")

    # ---- the watchdog's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            # this thread needs the interpreter; if a C call blocks it, this timer in C ends the process
            with contextlib.suppress(ValueError, RuntimeError):  # stderr is closed, or no file
                faulthandler.dump_traceback_later(1.5 * self._action[0].limit_seconds + 10, exit=True)
            self._asked_at = time.monotonic()
            try:
                self._beat()
                failure = self._look()
            except DistError:  # the first rank, which holds the store, is gone, maybe for a reason that it published
                broken = self._known or are_gone({0: self._last.get(0)}, "the connection to it broke")
                failure = None if self._closed.is_set() else broken
            except Exception as error:  # otherwise nobody would watch this rank any longer
                reason = f"rank {self.rank} cannot watch the others ({error!r})"
                failure = self._publish(PeerFailure([self.rank], FAILED, reason))
            self._asked_at = None
            if failure is not None:
                self._exit_for(failure)

    def _beat(self) -> None:
        action, began = self._action
        heartbeat = replace(action, action_seconds=time.monotonic() - began)  # another number each time
        with self._store_lock:
            self._store.set(f"heartbeat/{self.rank}", json.dumps(asdict(heartbeat)))

    def _look(self) -> PeerFailure | None:
        """The failure that another rank has published, or one that this rank finds now."""
        with self._store_lock:
            if self._store.check(["failure"]):
                self._known = PeerFailure(**json.loads(self._store.get("failure")))
                return self._known
            texts = self._store.multi_get([f"heartbeat/{rank}" for rank in self._watched])
        now = time.monotonic()
        for rank, text in zip(self._watched, texts, strict=True):
            heartbeat = Heartbeat(**json.loads(text))
            if heartbeat != self._last.get(rank):
                self._last[rank] = heartbeat
                self._arrived[rank] = now
        silent = {rank: now - arrived for rank, arrived in self._arrived.items()}
        failure = None
        if self.rank == 0:
            short = max(SILENT_SECONDS, 3 * self._interval)
            failure = find_failure(self._last, silent, self.timeout_seconds, short)
        elif silent[0] > self.timeout_seconds:
            failure = are_gone(self._last, f"no heartbeat for {self.timeout_seconds:.0f} s")
        return None if failure is None else self._publish(failure)

    def _exit_for(self, failure: PeerFailure) -> None:
        """Ends this process, unless its main thread ends it by itself in time."""
        if self.rank in failure.ranks and not failure.announced:
            run_with_timeout(STACKS_SECONDS, self._write_stacks)  # the disk of the run folder may be what hangs
        if not self._closed.wait(LEAVE_SECONDS if failure.announced else 0.0):
            self.end(failure)

    def _write_stacks(self) -> None:
        with self.stacks.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)

    def _publish(self, failure: PeerFailure) -> PeerFailure:
        """Publishes a failure to all ranks. Returns the first one that was published, which counts for all of them."""
        try:
            with self._store_lock:
                first: Any = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
                self._known = PeerFailure(**json.loads(first))
                return self._known
        except DistError:
            return failure
