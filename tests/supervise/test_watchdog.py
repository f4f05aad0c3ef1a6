"""Which rank the watchdog of another one names after a collective has failed."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from relora_mora.supervise.exits import LOST
from relora_mora.supervise.watchdog import Watchdog
from tests.tools.each import each


@pytest.mark.more
@each("alive,named", [((0, 1), [0]), ((0,), [1])])
def test_the_rank_whose_heartbeats_stop_is_named(tmp_path: Path, alive: tuple[int, ...], named: list[int]) -> None:
    """If there is none, the rank on which the collective failed is."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20), wait_for_workers=False)
    ended: list[object] = []
    address = ("127.0.0.1", store.port)
    dogs = [Watchdog(rank, 2, 60.0, address=address, job="a", end=ended.append, stacks=tmp_path) for rank in range(2)]
    for dog in dogs:
        dog.begin("step 7")
        dog.beat()
    for rank in alive:
        dogs[rank].start()
    failure = dogs[0].diagnose("connection closed")
    for dog in dogs:
        dog.close()
    assert (failure.ranks, failure.code, failure.announced) == (named, LOST, False)
    assert ("last action: step 7" in failure.reason) == (named == [1])
