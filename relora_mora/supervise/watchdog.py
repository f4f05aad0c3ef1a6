"""Ranks that watch each other through the job's key-value store, which works while a collective hangs.

Each rank's thread publishes a beat: a counter, what its main thread did last, and how long ago. The first rank looks at
all beats, the others at the first rank's. Who is silent, or has done nothing for longer than it may, is named in the
store; everybody reads that and ends. Ranks do the same things in the same order, so of ranks that are stuck the one
that has done the least is the cause, and of those that have done as little the one that waits for nobody.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

from relora_mora.distributed.waiting import in_collective
from relora_mora.supervise.exits import FAILED, LOST
from relora_mora.supervise.lock import host_id
from relora_mora.system.bounded import bounded

BEAT_SECONDS = 1.0
STORE_SECONDS = 15.0  # an answer of the store may take so long, then its host is gone
LEAVE_SECONDS = 5.0  # for a main thread to end by itself when another rank has left
SUSPECT_SECONDS = 4.0  # to find out whose beats stopped, when a collective has failed
STACKS_SECONDS = 1.0  # for a rank that hangs to write where


@dataclass(frozen=True)
class PeerFailure:
    """Why the job ends: the rank it began at, the exit code for all, and a sentence."""

    rank: int
    code: int
    reason: str
    left: bool  # that rank ended by itself and said so
    host: str = ""
    pid: int = 0  # of that rank


@dataclass
class _Seen:
    """The last beat of a rank, and when it came, on this rank's clock."""

    beat: int
    did: str
    done: int
    age: float
    within: float
    waits: bool  # in a collective
    host: str
    pid: int
    at: float


class Watchdog:
    """The watching thread of one rank. ``address`` is that of the job's store; ``end(verdict)`` must not return.

    ``timeout_seconds`` is how long a rank may be silent, or do nothing; :meth:`begin` can allow more for one action.
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
        self.rank, self.world_size, self.timeout_seconds, self.end, self.stacks = (
            rank,
            world_size,
            timeout_seconds,
            end,
            stacks,
        )
        # a connection of its own: a client answers one caller at a time
        store = TCPStore(
            *address, is_master=False, timeout=datetime.timedelta(seconds=STORE_SECONDS), wait_for_workers=False
        )
        self._store = PrefixStore(f"watch/{job}", store)
        self._interval = max(BEAT_SECONDS, world_size / 256)
        self._action: tuple[str, int, float, float] = ("started", 0, time.monotonic(), timeout_seconds)
        self._seen: dict[int, _Seen] = {}
        self._beat = 0
        self._lock = threading.Lock()
        self._asked_at: float | None = None  # while the store has not answered
        self._closed, self._suspicious = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.beat()

    def start(self) -> None:
        """After all ranks have made their first beat."""
        self._thread.start()

    # ---- of the main thread -----------------------------------------------------------------------------------

    def begin(self, what: str, within: float | None = None) -> None:
        """The main thread begins ``what``, which may take ``within`` seconds. All ranks call it for the same things in the same order."""
        self._action = (what, self._action[1] + 1, time.monotonic(), max(within or 0.0, self.timeout_seconds))

    def announce_exit(self, code: int, reason: str) -> None:
        """Tells the other ranks that this one ends by itself."""
        self._tell(PeerFailure(self.rank, code, reason, left=True))

    def diagnose(self, error: str) -> PeerFailure:
        """A collective failed: finds out whose fault it is. Waits a few seconds for beats that do not come."""
        self._suspicious.set()
        deadline = time.monotonic() + SUSPECT_SECONDS + 2 * self._interval
        while time.monotonic() < deadline:
            try:
                if (verdict := self._verdict()) is not None:
                    return verdict
            except DistError:
                return self._store_lost()
            time.sleep(self._interval / 4)
        return PeerFailure(
            self.rank, LOST, f"a collective failed on rank {self.rank} while all ranks were alive ({error})", left=False
        )

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(2 * STORE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def unanswered(self) -> PeerFailure | None:
        """For another thread: the store has not answered for too long. Its client waits without an end when the first rank is stopped."""
        asked_at = self._asked_at
        if asked_at is None or self._closed.is_set() or time.monotonic() - asked_at <= self.timeout_seconds:
            return None
        return self._gone(0, f"nothing heard for {time.monotonic() - asked_at:.0f} s")

    # ---- of the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            # the thread needs the interpreter: where a C call keeps it, this timer of C ends the process
            faulthandler.dump_traceback_later(1.5 * max(self.timeout_seconds, self._action[3]) + 10, exit=True)
            self._asked_at = time.monotonic()
            try:
                self.beat()
                verdict = self._verdict()
            except DistError:
                verdict = None if self._closed.is_set() else self._store_lost()
            except Exception as error:  # nobody would watch this rank any more
                verdict = self._tell(
                    PeerFailure(self.rank, FAILED, f"rank {self.rank} cannot watch the others ({error!r})", left=False)
                )
            self._asked_at = None
            if verdict is not None:
                self._obey(verdict)

    def _obey(self, verdict: PeerFailure) -> None:
        if verdict.rank == self.rank and not verdict.left:
            bounded(STACKS_SECONDS, self._write_stacks)  # what hangs may be the disk of the run folder
        grace = time.monotonic() + (LEAVE_SECONDS if verdict.left else 0.0)
        while time.monotonic() < grace:
            if self._closed.wait(0.1):
                return
        self.end(verdict)

    def _write_stacks(self) -> None:
        with self.stacks.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)

    def beat(self) -> None:
        what, done, since, within = self._action
        with self._lock:
            self._beat += 1
            value = {
                "beat": self._beat,
                "did": what,
                "done": done,
                "age": time.monotonic() - since,
                "within": within,
                "waits": in_collective(),
                "host": host_id(),
                "pid": os.getpid(),
            }
            self._store.set(f"beat/{self.rank}", json.dumps(value))

    def _verdict(self) -> PeerFailure | None:
        with self._lock:
            if self._store.check(["verdict"]):
                return PeerFailure(**json.loads(self._store.get("verdict")))
            watched = range(self.world_size) if self.rank == 0 or self._suspicious.is_set() else (0, self.rank)
            self._look_at(list(watched))
        found = self._silent() or (self._stuck() if self.rank == 0 else None)
        return None if found is None else self._tell(found)

    def _look_at(self, ranks: list[int]) -> None:
        now = time.monotonic()
        for rank, text in zip(ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            value = json.loads(text)
            if rank not in self._seen or self._seen[rank].beat != value["beat"]:
                self._seen[rank] = _Seen(**value, at=now)

    def _silent(self) -> PeerFailure | None:
        """A rank whose beats do not come any more."""
        allowed = min(SUSPECT_SECONDS, self.timeout_seconds) if self._suspicious.is_set() else self.timeout_seconds
        now = time.monotonic()
        for rank, seen in self._seen.items():
            if rank != self.rank and now - seen.at > allowed:
                return self._gone(rank, f"nothing heard for {now - seen.at:.0f} s")
        return None

    def _stuck(self) -> PeerFailure | None:
        """Of the ranks that have done nothing for longer than they may, the one that has done the least."""
        now = time.monotonic()
        ages = {rank: seen.age + now - seen.at for rank, seen in self._seen.items()}
        if not any(ages[rank] > seen.within for rank, seen in self._seen.items()):
            return None
        least = min(seen.done for seen in self._seen.values())
        behind = sorted(rank for rank, seen in self._seen.items() if seen.done == least)
        worst = max(behind, key=lambda rank: (not self._seen[rank].waits, ages[rank]))
        seen = self._seen[worst]
        if len(behind) == self.world_size and seen.waits:
            reason = f"all ranks have waited for each other for {ages[worst]:.0f} s ({seen.did}); is the network between the hosts up?"
        else:
            reason = f"rank {worst} hangs: it has done nothing for {ages[worst]:.0f} s, the last thing was: {seen.did}"
        return self._verdict_on(worst, f"{reason}; train.peer_timeout_seconds allows {seen.within:.0f} s")

    def _gone(self, rank: int, how: str) -> PeerFailure:
        last = f"; the last thing it did: {self._seen[rank].did}" if rank in self._seen else ""
        return self._verdict_on(rank, f"rank {rank} is gone ({how}){last}")

    def _verdict_on(self, rank: int, reason: str) -> PeerFailure:
        seen = self._seen.get(rank)
        return PeerFailure(rank, LOST, reason, left=False, host=seen.host if seen else "", pid=seen.pid if seen else 0)

    def _store_lost(self) -> PeerFailure:
        return self._gone(0, "the connection to it broke")

    def _tell(self, verdict: PeerFailure) -> PeerFailure:
        """The first verdict counts, for all ranks."""
        try:
            with self._lock:
                first: Any = self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
                return PeerFailure(**json.loads(first))
        except DistError:
            return verdict
