"""Which rank is at fault, from heartbeats alone."""

from __future__ import annotations

import pytest

from relora_mora.supervise.exits import LOST
from relora_mora.supervise.heartbeat import Heartbeat, Received, find_hung, find_silent

NOW = 1000.0


def _received(
    *, actions: int = 5, seconds: float = 1.0, in_collective: bool = False, ago: float = 0.0, limit: float = 60.0
) -> Received:
    """A heartbeat that came ``ago`` seconds ago, from a rank that had been in its last action for ``seconds``."""
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


def test_a_rank_is_silent_when_its_heartbeats_stay_away_for_longer_than_allowed():
    received = {0: _received(), 1: _received(ago=10.0)}
    assert find_silent(received, 10.0, NOW) is None
    failure = find_silent(received, 9.0, NOW)
    assert failure is not None and (failure.rank, failure.code, failure.announced) == (1, LOST, False)
    assert failure.reason == "rank 1 is gone (nothing heard for 10 s); the last thing it did: step 5"
    assert (failure.host, failure.pid) == ("here", 42)


@pytest.mark.parametrize(
    "ranks,cause,says",
    [
        # nobody is late, also where the others wait
        ([{"seconds": 59}, {"in_collective": True, "seconds": 59}], None, ""),
        # who has done less is the cause, though the other has waited for longer
        ([{"actions": 6, "in_collective": True, "seconds": 80}, {"actions": 5, "seconds": 70}], 1, "rank 1 hangs"),
        ([{"actions": 4, "seconds": 61}, {"actions": 5, "in_collective": True}], 0, "rank 0 hangs"),
        # and may take longer than the others may wait
        ([{"actions": 6, "in_collective": True, "seconds": 80}, {"seconds": 90, "limit": 1800}], None, ""),
        # of those that have done as little, the one that waits for nobody
        (
            [{"in_collective": True, "seconds": 80}, {"seconds": 70}],
            1,
            "done nothing for 70 s, the last thing was: step 5",
        ),
        # the time since the heartbeat came counts
        ([{"seconds": 50, "ago": 11}, {"in_collective": True}], 0, "done nothing for 61 s"),
        # all in the same collective: none of them
        ([{"in_collective": True, "seconds": 61}] * 2, 0, "all ranks have waited for each other for 61 s (step 5)"),
    ],
)
def test_of_ranks_that_stand_still_the_cause_is_named(ranks, cause, says):
    failure = find_hung({rank: _received(**values) for rank, values in enumerate(ranks)}, NOW)
    if cause is None:
        assert failure is None
    else:
        assert failure is not None and failure.rank == cause and says in failure.reason
        assert failure.reason.endswith("; train.peer_timeout_seconds allows 60 s")
