"""Which ranks are named when some are silent, make no progress, or a collective has failed."""

import datetime
import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from relora_mora.supervise.exits import LOST, PeerFailure
from relora_mora.supervise.watchdog import Heartbeat, Watchdog, find_failure
from tests.tools.each import each


@each(
    "ranks,named,says",
    [
        # nobody is late
        ([{"seconds": 59}, {"seconds": 59}], [], ""),
        ([{"ago": 12}, {}], [], ""),
        # no heartbeat for longer than allowed
        (
            [{"actions": 7}, {"ago": 13, "actions": 6}, {"ago": 12.5}],
            [1, 2],
            "ranks 1, 2 are gone (no heartbeat for 12",
        ),
        ([{"actions": 7}, {"ago": 13, "actions": 6}, {}], [1], "rank 1 is gone"),
        # the rank with fewer actions is the cause, although the other one has waited for longer
        ([{"actions": 6, "seconds": 80}, {"seconds": 70}], [1], "last action: step 5"),
        ([{"actions": 4, "seconds": 61}, {"actions": 5}], [0], "last action: step 4"),
        # it may take longer than the limit of a rank that waits for it
        ([{"actions": 6, "seconds": 80}, {"seconds": 90, "limit": 1800}], [], ""),
        # ranks that have begun equally few actions are all named
        ([{"seconds": 80}, {"seconds": 59}, {"actions": 6}], [0, 1], "made no progress for 80 s; last action: step 5"),
        # the time since the heartbeat arrived counts
        ([{"seconds": 58, "ago": 3}, {"actions": 6}], [0], "last action: step 5"),
        # a rank without heartbeats is gone, and the others wait for it
        (
            [{"seconds": 61}, {"seconds": 50, "ago": 11}],
            [1],
            "rank 1 is gone (no heartbeat for 4 s); last action: step 5",
        ),
        # after a collective has failed, a rank is missed soon
        ([{"failed": "reset", "actions": 6}, {"ago": 3}], [], ""),
        ([{"failed": "reset", "actions": 6}, {"ago": 5}], [1], "last action: step 5"),
        ([{"failed": "reset", "actions": 6, "seconds": 9}, {}], [0], "while all ranks were alive (reset)"),
    ],
)
def test_the_ranks_at_fault_are_named(ranks: list[dict[str, Any]], named: list[int], says: str) -> None:
    heartbeats, silent = {}, {}
    for rank, given in enumerate(ranks):
        values = {"actions": 5, "seconds": 1.0, "ago": 0.0, "limit": 60.0, "failed": ""} | given
        action = f"step {values['actions']}"
        heartbeats[rank] = Heartbeat(action, values["actions"], values["seconds"], values["limit"], values["failed"])
        silent[rank] = values["ago"]
    failure = find_failure(heartbeats, silent, 12.0, 4.0)
    assert (failure.ranks if failure else []) == named
    if failure is not None:
        assert (failure.code, failure.announced) == (LOST, False)
        assert says in failure.reason


@pytest.mark.more
def test_all_ranks_hear_which_rank_is_gone_after_a_collective_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20), wait_for_workers=False)
    heard: list[PeerFailure] = []
    both = threading.Event()

    def end(failure: PeerFailure) -> None:
        heard.append(failure)
        if len(heard) == 2:
            both.set()
        both.wait(60)

    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which is no file
    address = ("127.0.0.1", store.port)
    dogs = [Watchdog(rank, 3, 60.0, address=address, job="a", end=end, stacks=tmp_path / "x") for rank in range(3)]
    for dog in dogs[:2]:  # the third has sent its first heartbeat and sends no other
        dog.begin("step 7")
        dog.start()
    dogs[1].begin("waiting", failed="connection closed")
    assert both.wait(60)
    for dog in dogs:
        dog.close()
    assert [failure.ranks for failure in heard] == [[2], [2]]
    assert "last action: started" in heard[0].reason
