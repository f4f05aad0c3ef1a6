"""Finding the rank at fault from heartbeats."""

from __future__ import annotations

import pytest

from relora_mora.supervise.exits import LOST
from relora_mora.supervise.heartbeat import Heartbeat, Received, find_hung, find_silent

NOW = 1000.0


def _received(
    *, actions: int = 5, seconds: float = 1.0, in_collective: bool = False, ago: float = 0.0, limit: float = 60.0
) -> Received:
    """A heartbeat that arrived ``ago`` seconds ago, when the rank had been in its last action for ``seconds``."""
    heartbeat = Heartbeat(
        number=7,
        action=f"step {actions}",
        actions=actions,
        action_seconds=seconds,
        limit_seconds=limit,
        in_collective=in_collective,
        host="here",
        pid=42,
    )
    return Received(heartbeat, NOW - ago)


def test_a_rank_is_silent_if_no_heartbeat_comes_for_longer_than_allowed():
    received = {0: _received(), 1: _received(ago=10.0)}
    assert find_silent(received, 10.0, NOW) is None
    failure = find_silent(received, 9.0, NOW)
    assert failure is not None
    assert (failure.rank, failure.code, failure.announced) == (1, LOST, False)
    assert failure.reason == "rank 1 is gone (no heartbeat for 10 s); its last action: step 5"
    assert (failure.host, failure.pid) == ("here", 42)


@pytest.mark.parametrize(
    "ranks,cause,says",
    [
        # nobody is late, even if the others are waiting
        ([{"seconds": 59}, {"in_collective": True, "seconds": 59}], None, ""),
        # the rank with fewer actions is the cause, although the other one has waited for longer
        ([{"actions": 6, "in_collective": True, "seconds": 80}, {"actions": 5, "seconds": 70}], 1, "rank 1 hangs"),
        ([{"actions": 4, "seconds": 61}, {"actions": 5, "in_collective": True}], 0, "rank 0 hangs"),
        # it may take longer than the limit of a rank that waits for it
        ([{"actions": 6, "in_collective": True, "seconds": 80}, {"seconds": 90, "limit": 1800}], None, ""),
        # among ranks with equally few actions, the one that does not wait
        (
            [{"in_collective": True, "seconds": 80}, {"seconds": 70}],
            1,
            "its last action has taken 70 s so far: step 5",
        ),
        # the time since the heartbeat arrived counts
        ([{"seconds": 50, "ago": 11}, {"in_collective": True}], 0, "has taken 61 s so far"),
        # all ranks are in the same collective, so no rank is blamed
        ([{"in_collective": True, "seconds": 61}] * 2, 0, "all ranks have waited for each other for 61 s (step 5)"),
    ],
)
def test_the_rank_at_fault_is_named_if_ranks_make_no_progress(ranks, cause, says):
    failure = find_hung({rank: _received(**values) for rank, values in enumerate(ranks)}, NOW)
    if cause is None:
        assert failure is None
    else:
        assert failure is not None
        assert failure.rank == cause
        assert says in failure.reason
        assert failure.reason.endswith("; train.peer_timeout_seconds allows 60 s")
