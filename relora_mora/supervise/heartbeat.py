"""Heartbeats of the ranks, and which rank is at fault if they stop or make no progress.

The ranks do the same actions in the same order. So among ranks that make no progress, the one that has begun the fewest
actions is the cause. If several have begun equally few, it is one that is not waiting for the others in a collective.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from relora_mora.supervise.exits import LOST


@dataclass(frozen=True)
class PeerFailure:
    """The reason why the whole job ends: the rank at fault, the exit code for all ranks, and a sentence."""

    rank: int
    code: int
    reason: str
    announced: bool  # the rank exits by itself and has announced it
    host: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Heartbeat:
    """The message that a rank sends to the others about once a second."""

    number: int  # of this heartbeat
    action: str  # the last action that the main thread began
    actions: int  # how many actions it has begun
    action_seconds: float  # since it began the last one
    limit_seconds: float  # allowed for the last one
    in_collective: bool  # it waits for other ranks
    host: str
    pid: int


@dataclass(frozen=True)
class Received:
    """The last heartbeat of a rank, and when it arrived by the clock of this rank's watchdog."""

    heartbeat: Heartbeat
    at: float


def find_silent(received: Mapping[int, Received], allowed_seconds: float, now: float) -> PeerFailure | None:
    """A rank that has sent no heartbeat for longer than ``allowed_seconds``."""
    for rank, last in received.items():
        if now - last.at > allowed_seconds:
            return lost(rank, f"no heartbeat for {now - last.at:.0f} s", last.heartbeat)
    return None


def find_hung(received: Mapping[int, Received], now: float) -> PeerFailure | None:
    """The rank at fault if an action takes longer than allowed; ``received`` has the heartbeats of all ranks.

    Ranks that have begun more actions may exceed their own limits while they wait for ranks that are within theirs.
    """
    seconds = {rank: last.heartbeat.action_seconds + now - last.at for rank, last in received.items()}
    least = min(last.heartbeat.actions for last in received.values())
    slowest = sorted(rank for rank, last in received.items() if last.heartbeat.actions == least)
    if all(seconds[rank] <= received[rank].heartbeat.limit_seconds for rank in slowest):
        return None
    cause = max(slowest, key=lambda rank: (not received[rank].heartbeat.in_collective, seconds[rank]))
    heartbeat = received[cause].heartbeat
    action = heartbeat.action
    if len(slowest) == len(received) and heartbeat.in_collective:
        reason = (
            f"all ranks have waited for each other for {seconds[cause]:.0f} s ({action}); "
            "is the network between the hosts up?"
        )
    else:
        reason = f"rank {cause} hangs: its last action has taken {seconds[cause]:.0f} s so far: {action}"
    reason = f"{reason}; train.peer_timeout_seconds allows {heartbeat.limit_seconds:.0f} s"
    return _failure(cause, reason, heartbeat)


def lost(rank: int, how: str, heartbeat: Heartbeat | None) -> PeerFailure:
    """The failure of a rank that no longer answers; ``heartbeat`` is its last one, None if none has arrived."""
    last = f"; its last action: {heartbeat.action}" if heartbeat is not None else ""
    return _failure(rank, f"rank {rank} is gone ({how}){last}", heartbeat)


def _failure(rank: int, reason: str, heartbeat: Heartbeat | None) -> PeerFailure:
    host, pid = (heartbeat.host, heartbeat.pid) if heartbeat is not None else ("", 0)
    return PeerFailure(rank, LOST, reason, announced=False, host=host, pid=pid)
