"""Heartbeats of the ranks, and which ranks are named if some are silent or make no progress.

The ranks do the same actions in the same order. So among ranks that make no progress, those that have begun the fewest
actions are named. A rank that sends no heartbeats comes before them: it is gone, and the others wait for it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from relora_mora.supervise.exits import LOST


@dataclass(frozen=True)
class PeerFailure:
    """The reason why the whole job ends: the ranks at fault, the exit code for all ranks, and a sentence."""

    ranks: list[int]
    code: int
    reason: str
    announced: bool = False  # the rank exits by itself and has announced it


@dataclass(frozen=True)
class Heartbeat:
    """The message that a rank sends to the others about once a second."""

    number: int  # of this heartbeat
    action: str  # the last action that the main thread began
    actions: int  # how many actions it has begun
    action_seconds: float  # since it began the last one
    limit_seconds: float  # allowed for the last one


@dataclass(frozen=True)
class Received:
    """The last heartbeat of a rank, and when it arrived by the clock of this rank."""

    heartbeat: Heartbeat
    at: float


def find_lost(received: Mapping[int, Received], allowed_seconds: float, now: float) -> PeerFailure | None:
    """The ranks that have sent no heartbeat for longer than ``allowed_seconds``; None if there are none."""
    silent = {rank: last.heartbeat for rank, last in received.items() if now - last.at > allowed_seconds}
    return lost(silent, f"no heartbeat for {allowed_seconds:.0f} s") if silent else None


def find_hung(received: Mapping[int, Received], silent_seconds: float, now: float) -> PeerFailure | None:
    """The ranks that have done least, if one of them exceeds the limit of its action; of all ranks' heartbeats.

    Ranks that have begun more actions may exceed their own limits while they wait for ranks that are within theirs.
    """
    seconds = {rank: last.heartbeat.action_seconds + now - last.at for rank, last in received.items()}
    least = min(last.heartbeat.actions for last in received.values())
    slowest = [rank for rank, last in received.items() if last.heartbeat.actions == least]
    late = [rank for rank in slowest if seconds[rank] > received[rank].heartbeat.limit_seconds]
    if not late:
        return None
    longest = max(late, key=lambda rank: seconds[rank])
    heartbeat = received[longest].heartbeat
    reason = (
        f"{_named(slowest)} made no progress for {seconds[longest]:.0f} s; last action: {heartbeat.action}; "
        f"train.peer_timeout_seconds allows {heartbeat.limit_seconds:.0f} s"
    )
    return find_lost(received, silent_seconds, now) or PeerFailure(slowest, LOST, reason)


def lost(silent: Mapping[int, Heartbeat | None], how: str) -> PeerFailure:
    """The failure of ranks that no longer answer; their last heartbeats, None if none has arrived."""
    arrived = [heartbeat for heartbeat in silent.values() if heartbeat is not None]
    least = min(arrived, key=lambda heartbeat: heartbeat.actions, default=None)
    last = f"; last action: {least.action}" if least is not None else ""
    verb = "is" if len(silent) == 1 else "are"
    return PeerFailure(list(silent), LOST, f"{_named(silent)} {verb} gone ({how}){last}")


def _named(ranks: Collection[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"
