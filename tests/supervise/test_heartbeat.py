"""Finding the ranks at fault from heartbeats."""

from __future__ import annotations

from relora_mora.supervise.exits import LOST
from relora_mora.supervise.heartbeat import Heartbeat, Received, find_hung, find_lost
from tests.tools.each import each

NOW = 1000.0


def _received(*, actions: int = 5, seconds: float = 1.0, ago: float = 0.0, limit: float = 60.0) -> Received:
    """A heartbeat that arrived ``ago`` seconds ago, when the rank had been in its last action for ``seconds``."""
    heartbeat = Heartbeat(
        number=7, action=f"step {actions}", actions=actions, action_seconds=seconds, limit_seconds=limit
    )
    return Received(heartbeat, NOW - ago)


def test_ranks_are_lost_if_no_heartbeat_comes_for_longer_than_allowed():
    received = {0: _received(actions=7), 1: _received(ago=10.0, actions=6), 2: _received(ago=12.0)}
    assert find_lost(received, 12.0, NOW) is None
    failure = find_lost(received, 11.0, NOW)
    assert failure is not None
    assert (failure.ranks, failure.code, failure.announced) == ([2], LOST, False)
    assert failure.reason.startswith("rank 2 is gone (")
    failure = find_lost(received, 9.0, NOW)
    assert failure is not None
    assert failure.ranks == [1, 2]
    assert failure.reason.startswith("ranks 1, 2 are gone (")
    assert failure.reason.endswith("last action: step 5"), "the one that has done least"


@each(
    "ranks,cause,action",
    [
        # nobody is late
        ([{"seconds": 59}, {"seconds": 59}], [], ""),
        # the rank with fewer actions is the cause, although the other one has waited for longer
        ([{"actions": 6, "seconds": 80}, {"seconds": 70}], [1], "step 5"),
        ([{"actions": 4, "seconds": 61}, {"actions": 5}], [0], "step 4"),
        # it may take longer than the limit of a rank that waits for it
        ([{"actions": 6, "seconds": 80}, {"seconds": 90, "limit": 1800}], [], ""),
        # ranks that have begun equally few actions are all named
        ([{"seconds": 80}, {"seconds": 59}, {"actions": 6}], [0, 1], "step 5"),
        # the time since the heartbeat arrived counts
        ([{"seconds": 58, "ago": 3}, {"actions": 6}], [0], "step 5"),
        # a rank without heartbeats is gone, and the others wait for it
        ([{"seconds": 61}, {"seconds": 50, "ago": 11}], [1], "step 5"),
    ],
)
def test_the_ranks_that_have_done_least_are_named_if_they_make_no_progress(ranks, cause, action):
    failure = find_hung({rank: _received(**values) for rank, values in enumerate(ranks)}, 4.0, NOW)
    assert (failure.ranks if failure else []) == cause
    if failure is not None:
        assert failure.code == LOST
        assert action in failure.reason
