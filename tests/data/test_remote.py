"""Over http a fault that passes changes no byte, and a fault that stays is one clear error."""

from __future__ import annotations

import random
import time
from contextlib import closing
from email.utils import formatdate

import pytest

from relora_mora.data import network
from relora_mora.data.errors import SourceError
from relora_mora.data.network import RETRIES, TransientError, retry_after_seconds, retrying
from relora_mora.data.remote import open_remote
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, make_lane, some_texts, write_shard
from tests.tools.each import each
from tests.tools.faulty_server import FAULTS, serving

pytestmark = pytest.mark.usefixtures("short_waits")


def _write(folder):
    """A file of 480 kB."""
    return write_shard(folder / "a.json.gz", [random.Random(n).randbytes(60).hex() for n in range(6000)])


def _read(server, timeout_seconds=8.0):
    with closing(open_remote(Shard("a.json.gz", f"{server.url}/a.json.gz"), timeout_seconds)) as source:
        pieces = []
        while piece := source.read(50_000):
            pieces.append(piece)
        return b"".join(pieces)


@each("etag", [True, False])
def test_no_fault(tmp_path, etag):
    shard = _write(tmp_path)
    before = RETRIES.retries
    with serving(tmp_path, etag=etag) as server:
        assert _read(server) == shard.read_bytes()
        assert len(server.requests) == 3  # blocks of 64 KiB and twice as much each time
    assert RETRIES.retries == before


@each("name", ["a.json", "a.json.gz"])
def test_a_server_without_ranges_is_refused_with_the_remedy(tmp_path, name):
    write_shard(tmp_path / name, some_texts(10))
    with (
        serving(tmp_path, ranges=False) as server,
        pytest.raises(SourceError, match=rf"{name}: the server answers no ranges, .*; download the file and give its"),
    ):
        make_lane(data_config(f"{server.url}/{name}"), 1, 0).next_block()
        assert len(server.requests) == 1


def test_an_empty_file(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(b"")
    for ranges in (True, False):
        with serving(tmp_path, ranges=ranges) as server:
            assert _read(server) == b""


@pytest.mark.more
@each("fault", FAULTS)
def test_each_fault_twice(tmp_path, fault):
    shard = _write(tmp_path)
    before = RETRIES.retries
    began = time.monotonic()
    with serving(tmp_path, lambda n: fault if n in (0, 2) else None) as server:
        assert _read(server, timeout_seconds=4.0 if fault == "stall" else 60.0) == shard.read_bytes()
        assert set(server.faults) == {fault}
        # a length that is too long is no fault of an answer whose range says how much follows
        assert RETRIES.retries - before == (0 if fault == "long" else 2)
    if fault == "429":
        assert time.monotonic() - began > 2  # Retry-After: 1, twice


def test_a_connection_that_never_gets_far_is_read_in_smaller_pieces(tmp_path):
    shard = _write(tmp_path)
    body = shard.read_bytes()[:60_000]
    shard.write_bytes(body)
    with serving(tmp_path, lambda n: "few") as server:
        assert _read(server) == body
        assert len(server.requests) > 60_000 / 3000


@each("proxy", ["socks5://127.0.0.1:1080", "http://[secret"])
def test_a_proxy_that_cannot_be_used_is_named(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(SourceError, match=r"proxies in the environment .*requests\[socks\]") as raised:
        open_remote(Shard("a", "http://example.org/a.json"), 0.5).read(9)
    assert "secret" not in str(raised.value)


@each("status,message", [(404, "status 404"), (403, "access denied"), (401, "access denied")])
def test_a_lasting_fault_is_not_retried(tmp_path, status, message, monkeypatch):
    with serving(tmp_path, lambda n: None) as server:
        if status != 404:
            monkeypatch.setattr(
                server.RequestHandlerClass, "_file", lambda self, path, fault: self._answer(status, b"", {})
            )
        began = time.monotonic()
        with pytest.raises(SourceError, match=message):
            _read(server)
        assert time.monotonic() - began < 2
        assert len(server.requests) == 1


def test_waits_double_with_jitter_up_to_a_bound_and_honor_retry_after(monkeypatch):
    monkeypatch.setattr(network, "FIRST_WAIT_SECONDS", 0.25)
    monkeypatch.setattr(network, "LONGEST_WAIT_SECONDS", 30.0)
    busy = TransientError("busy")

    def waits_of(*errors):
        left = iter(errors)
        waits = []

        def ask():
            for error in left:
                raise error

        retrying(ask, "a", 1e6, sleep=waits.append)
        return waits

    before, state = RETRIES.retries, random.getstate()
    waits, others = waits_of(*[busy] * 12), waits_of(*[busy] * 12)
    assert (RETRIES.retries - before, random.getstate()) == (24, state)
    bounds = [min(30.0, 0.25 * 2**attempt) for attempt in range(1, 13)]
    assert all(bound / 4 <= wait <= bound for bound, wait in zip(bounds, waits, strict=True))
    assert not set(waits) & set(others)
    asked, own, too_long = waits_of(TransientError("busy", 7.0), busy, TransientError("busy", 1e9))
    assert asked == 7.0
    assert own < 1
    assert 1e6 - 9 < too_long <= 1e6, "what is left of the time"


@each("value,seconds", [("12", 12), (None, 60), ("", 0), ("soon", 0), ("\xb2", 0)])
def test_retry_after_is_a_number_or_a_date(value, seconds):
    value = formatdate(time.time() + 60, usegmt=True) if value is None else value
    assert seconds - 10 * (seconds == 60) <= retry_after_seconds({"Retry-After": value}) <= seconds + (seconds == 60)
