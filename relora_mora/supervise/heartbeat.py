"""Heartbeats of the ranks, and which rank is at fault when they stop or stand still.

The ranks do the same things in the same order. So of ranks that stand still, the one that has done the least is the
cause; of those that have done as little, the one that is not waiting for the others in a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from relora_mora.supervise.exits import LOST


@dataclass(frozen=True)
class PeerFailure:
    """Why the whole job ends: the rank at fault, the exit code for all ranks, and a sentence."""

    rank: int
    code: int
    reason: str
    announced: bool  # the rank exits by itself, and has said so
    host: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Heartbeat:
    """What a rank tells the others every second or so."""

    number: int  # of this heartbeat
    action: str  # what the main thread began last
    actions: int  # how many it has begun
    action_seconds: float  # since it began the last one
    limit_seconds: float  # what that one may take
    in_collective: bool  # waits for other ranks
    host: str
    pid: int


@dataclass(frozen=True)
class Received:
    """The last heartbeat of a rank, and when it came, by the clock of this rank's watchdog."""

    heartbeat: Heartbeat
    at: float


def find_silent(received: Mapping[int, Received], allowed_seconds: float, now: float) -> PeerFailure | None:
    """A rank from which no heartbeat has come for longer than ``allowed_seconds``."""
    for rank, last in received.items():
        if now - last.at > allowed_seconds:
            return lost(rank, f"nothing heard for {now - last.at:.0f} s", last.heartbeat)
    return None


def find_hung(received: Mapping[int, Received], now: float) -> PeerFailure | None:
    """The cause, when an action takes longer than it may; ``received`` has the heartbeats of all ranks.

    Those that have done more may wait for the others beyond their own limits, as long as these are within theirs.
    """
    seconds = {rank: last.heartbeat.action_seconds + now - last.at for rank, last in received.items()}
    least = min(last.heartbeat.actions for last in received.values())
    behind = sorted(rank for rank, last in received.items() if last.heartbeat.actions == least)
    if all(seconds[rank] <= received[rank].heartbeat.limit_seconds for rank in behind):
        return None
    cause = max(behind, key=lambda rank: (not received[rank].heartbeat.in_collective, seconds[rank]))
    heartbeat = received[cause].heartbeat
    action = heartbeat.action
    if len(behind) == len(received) and heartbeat.in_collective:
        reason = (
            f"all ranks have waited for each other for {seconds[cause]:.0f} s ({action}); "
            "is the network between the hosts up?"
        )
    else:
        reason = f"rank {cause} hangs: it has done nothing for {seconds[cause]:.0f} s, the last thing was: {action}"
    reason = f"{reason}; train.peer_timeout_seconds allows {heartbeat.limit_seconds:.0f} s"
    return _failure(cause, reason, heartbeat)


def lost(rank: int, how: str, heartbeat: Heartbeat | None) -> PeerFailure:
    """A rank that does not answer any more; ``heartbeat`` is its last one, None where none has come."""
    last = f"; the last thing it did: {heartbeat.action}" if heartbeat is not None else ""
    return _failure(rank, f"rank {rank} is gone ({how}){last}", heartbeat)


def _failure(rank: int, reason: str, heartbeat: Heartbeat | None) -> PeerFailure:
    host, pid = (heartbeat.host, heartbeat.pid) if heartbeat is not None else ("", 0)
    return PeerFailure(rank, LOST, reason, announced=False, host=host, pid=pid)
