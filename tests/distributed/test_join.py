"""Where the ranks of a start meet."""

from __future__ import annotations

import importlib
import socket
import threading

import pytest
from torch import distributed as dist

join = importlib.import_module("relora_mora.distributed.join")  # the package shows the function of that name


def _store(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)


def test_ranks_do_not_meet_in_the_store_of_an_earlier_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    earlier = _store(port)
    dist.PrefixStore("seats", earlier).set("1", "")  # rank 1 has met there
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    looked = threading.Event()
    has_met = join.has_met

    def look(store: dist.Store, rank: int) -> bool:
        met = has_met(store, rank)
        looked.set()
        return met

    monkeypatch.setattr(join, "has_met", look)
    found: list[dist.Store] = []
    rank = threading.Thread(target=lambda: found.append(join._store_of_this_start(1, 60.0)))
    rank.start()
    assert looked.wait(60), "it did not look"
    del earlier
    now = _store(port)
    now.set("start", "this")
    rank.join(60)
    assert found and found[0].check(["start"])
