"""How the ranks of a job find and join each other."""

import importlib
import resource
import socket
import threading
import time
from unittest import mock

import pytest
from torch import distributed as dist

from relora_mora.train.pretrain import _end_if_lost

join = importlib.import_module("relora_mora.distributed.join")  # the package shows the function of that name


def _store(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)


def test_ranks_do_not_meet_in_the_store_of_an_earlier_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    earlier = _store(port)
    earlier.set("met/1", "1")  # rank 1 was there
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    found: list[dist.Store] = []
    rank = threading.Thread(target=lambda: found.append(join._meet(1, 2, 60.0)))
    rank.start()
    while earlier.get("met/1") == b"1":
        time.sleep(0.01)  # until it has looked
    del earlier
    now = _store(port)
    now.set("met/0", "1")
    now.set("start", "this")
    rank.join(60)
    assert found
    assert found[0].check(["start"])


def test_a_port_that_another_job_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "PORT_SECONDS", 0.1)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(join.JoinError, match=rf"127.0.0.1:{port} .*EADDRINUSE.*MASTER_PORT"):
            join.join(5.0)


def _let_gloo_fail(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Makes gloo fail to connect two ranks that have met."""
    store = dist.HashStore()
    store.set("met/1", "1")

    def init_process_group(*args: object, **kwargs: object) -> None:
        raise RuntimeError(message)

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(join, "bind_device", lambda: None)


def test_if_ranks_cannot_connect_the_message_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    _let_gloo_fail(monkeypatch, "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error")
    with pytest.raises(
        join.JoinError, match=r"rank 0 of 2 .* node1:0 .*no error.*check .*GLOO_SOCKET_IFNAME"
    ) as raised:
        join.join(1.0)
    guard = mock.Mock()
    _end_if_lost(guard, raised.value)
    assert guard.mock_calls == [], "this is not a lost rank"


def test_too_few_open_files_are_not_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exit code of a lost rank, a job script would restart the run forever."""
    _let_gloo_fail(monkeypatch, "[enforce fail at gloo/transport/tcp/device.cc:186] rv != -1. Too many open files")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(ValueError, match=r"1024 files .*ulimit -n"):
        join.join(1.0)
