"""Over http a fault that passes changes no byte, and a fault that stays is one clear error."""

from __future__ import annotations

import gzip
import itertools
import random
import threading
import time
from contextlib import closing
from email.utils import formatdate

import pytest

from relora_mora.data.bytes import transport
from relora_mora.data.bytes.remote import FIRST_BLOCK_BYTES, RemoteFile
from relora_mora.data.bytes.retry import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    RETRIES,
    TransientError,
    retry_after_seconds,
    retrying,
)
from relora_mora.data.errors import SourceError
from relora_mora.data.formats.file_rows import iter_texts
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, documents_in, make_lane, some_texts, write_shard, write_shards
from tests.tools.faulty_server import FAULTS, serving

JSON_LINES = (".json", ".json.gz", ".jsonl.zst")


@pytest.fixture
def shard(tmp_path):
    return write_shard(
        tmp_path / "a.json.gz", [random.Random(n).randbytes(60).hex() for n in range(6000)]
    )  # 480 kB compressed


def _read(server, timeout_seconds=8.0):
    with closing(RemoteFile(Shard("a.json.gz", f"{server.url}/a.json.gz"), timeout_seconds, in_order=True)) as source:
        pieces = []
        while piece := source.read(50_000):
            pieces.append(piece)
        return b"".join(pieces)


@pytest.mark.parametrize("etag", [True, False])
def test_no_fault(tmp_path, shard, etag):
    before = RETRIES.retries
    with serving(tmp_path, etag=etag) as server:
        assert _read(server) == shard.read_bytes()
        assert len(server.requests) == 2  # a small block, and a larger one
    assert RETRIES.retries == before


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
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
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_twice(tmp_path, shard, fault):
    before = RETRIES.retries
    began = time.monotonic()
    with serving(tmp_path, lambda n: fault if n in (0, 2) else None) as server:
        assert _read(server, timeout_seconds=4.0 if fault == "stall" else 60.0) == shard.read_bytes()
        assert set(server.faults) == {fault}
        # a length that is too long is no fault of an answer whose range says how much follows
        assert RETRIES.retries - before == (0 if fault == "long" else 2)
    if fault == "429":
        assert time.monotonic() - began > 2  # Retry-After: 1, twice


def test_a_connection_that_never_gets_far_is_read_in_smaller_pieces(tmp_path, shard):
    body = shard.read_bytes()[:60_000]
    shard.write_bytes(body)
    with serving(tmp_path, lambda n: "few") as server:
        assert _read(server) == body
        assert len(server.requests) > 60_000 / 3000


def test_a_server_that_comes_up_late(tmp_path, shard):
    with serving(tmp_path) as server:
        port = server.server_address[1]
    read = threading.Event()
    before = RETRIES.retries

    def serve():
        while RETRIES.retries - before <= 3 and not read.wait(0.005):
            pass
        with serving(tmp_path, port=port):
            read.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert _read(server) == shard.read_bytes()  # connections are refused at first
    finally:
        read.set()
        thread.join()
    assert RETRIES.retries - before > 3


@pytest.mark.more
def test_faults_at_a_tenth_of_the_requests_do_not_change_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "STALL_SECONDS", 0.2)
    names = [f"{n}{suffix}" for n in range(10) for suffix in (*JSON_LINES, ".txt", ".txt.gz", ".csv.zst")]
    for seed, name in enumerate(names):
        write_shard(tmp_path / name, some_texts(12, seed=seed))
    blocks = 6000  # more than an epoch
    clean = make_lane(data_config([f"{tmp_path}/{name}" for name in names]), 1, 0)
    expected = [clean.next_block().tokens.tolist() for _ in range(blocks)]
    rng = random.Random(0)
    kinds = itertools.cycle(FAULTS)
    before = RETRIES.retries
    with serving(tmp_path, lambda n: next(kinds) if rng.random() < 0.1 else None) as server:
        server.stall_seconds = 0.5
        server.retry_after["429"] = "0"
        lane = make_lane(data_config([f"{server.url}/{name}" for name in names]), 1, 0)
        assert [lane.next_block().tokens.tolist() for _ in range(blocks)] == expected
        assert 0.05 < len(server.faults) / len(server.requests) < 0.15
        assert set(server.faults) == set(FAULTS)
        assert RETRIES.retries - before >= len(server.faults) - 1  # the last one may not have happened yet
    assert lane.state()["epoch"] >= 1
    assert not lane.state()["skipped"]


@pytest.mark.more
def test_a_server_that_stays_unreachable(tmp_path, shard):
    with serving(tmp_path, lambda n: "503" if n else "reset") as server:
        config = data_config(f"{server.url}/a.json.gz", timeout_seconds=0.5)
        began = time.monotonic()
        with pytest.raises(
            SourceError, match=r"a\.json\.gz at byte \d+: gave up after 0\.5 s .*status 503.*data\.timeout_seconds"
        ):
            list(iter_texts(config.train, split="train", config=config))
        assert 0.4 < time.monotonic() - began < 5
    with pytest.raises(SourceError, match=r"gave up after 0\.3 s"):
        list(
            iter_texts(
                f"{server.url}/a.json.gz", split="train", config=config.model_copy(update={"timeout_seconds": 0.3})
            )
        )


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "http://[secret"])
def test_a_proxy_that_cannot_be_used_is_named(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(SourceError, match=r"check it, and the proxy in HTTP_PROXY, .*requests\[socks\]") as raised:
        RemoteFile(Shard("a", "http://example.org/a.json"), 0.5).read(9)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("location", ["/b\xfccher.json", "http://[bad/"])
def test_a_redirect_to_an_invalid_url(location, tmp_path, monkeypatch):
    with serving(tmp_path) as server:
        monkeypatch.setattr(
            server.RequestHandlerClass,
            "_file",
            lambda self, path, fault: self._answer(302, b"", {"Location": location}),
        )
        with pytest.raises(SourceError, match="a redirects to an invalid url"):
            RemoteFile(Shard("a", f"{server.url}/a.json"), 5.0).read(9)


@pytest.mark.more
@pytest.mark.parametrize(
    "etag,said", [(True, "changed while it was read"), (False, r"gave up .* the size of the file is")]
)
def test_a_file_that_changes(tmp_path, shard, etag, said):
    with serving(tmp_path, etag=etag) as server:
        remote = Shard("a", f"{server.url}/a.json.gz")
        with closing(RemoteFile(remote, 0.5, in_order=True)) as source:
            source.read(50_000)
            shard.write_bytes(shard.read_bytes() + b"more")
            source.read(50_000)  # of the same block
            with pytest.raises(SourceError, match=said):
                source.read(400_000)


@pytest.mark.parametrize("status,message", [(404, "status 404"), (403, "access denied"), (401, "access denied")])
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


def test_a_file_that_is_cut_short_on_the_server(tmp_path):
    body = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(20_000)))
    (tmp_path / "cut.json.gz").write_bytes(body[:-5000])
    with serving(tmp_path) as server:
        config = data_config(f"{server.url}/cut.json.gz")
        with pytest.raises(SourceError, match=r"http\S+/cut\.json\.gz: its compressed data breaks off at byte"):
            list(iter_texts(config.train, split="train", config=config))


@pytest.mark.more
@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst"])
def test_damage_is_not_retried(tmp_path, suffix):
    path = write_shard(
        tmp_path / f"a{suffix}", [f"{random.Random(n).random()} {text}" for n, text in enumerate(some_texts(12_000))]
    )
    before = RETRIES.retries
    with serving(tmp_path, lambda n: "corrupt" if n == 0 else None) as server:
        config = data_config(f"{server.url}/a{suffix}", max_bad_fraction=1.0)
        with pytest.raises(SourceError, match=rf"http\S+/a{suffix}: its compressed data is damaged") as remote:
            list(iter_texts(config.train, split="train", config=config))
    assert RETRIES.retries == before
    body = path.read_bytes()  # the same bytes on a disk end at the same place
    at = min(len(body), FIRST_BLOCK_BYTES) // 2
    path.write_bytes(body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :])
    with pytest.raises(SourceError) as local:
        list(iter_texts(str(path), split="train", config=data_config(path, max_bad_fraction=1.0)))
    assert str(remote.value).endswith(str(local.value))


def test_waits_double_with_jitter_up_to_a_bound(monkeypatch):
    monkeypatch.undo()  # ends the short waits

    def waits_of(failures):
        waits = []
        left = iter(range(failures))
        before = RETRIES.retries
        state = random.getstate()

        def ask():
            if next(left, None) is not None:
                raise TransientError("busy")

        retrying(ask, "a", 1e6, sleep=waits.append)
        assert RETRIES.retries - before == failures
        assert random.getstate() == state
        return waits

    waits = waits_of(12)
    others = waits_of(12)
    for attempt, wait in enumerate(waits, 1):
        bound = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
        assert bound / 4 <= wait <= bound
    assert not set(waits) & set(others)


def test_retry_after_is_honored_and_read():
    waits = []
    answers = iter([TransientError("busy", 7.0), TransientError("busy"), TransientError("busy", 1e9)])

    def ask():
        error = next(answers, None)
        if error:
            raise error
        return "done"

    assert retrying(ask, "a", 100.0, sleep=waits.append) == "done"
    assert waits[0] == 7.0
    assert waits[1] < 1
    assert 99 < waits[2] <= 100
    assert retry_after_seconds({"Retry-After": "12"}) == 12
    assert 50 < retry_after_seconds({"Retry-After": formatdate(time.time() + 60, usegmt=True)}) <= 61
    assert (
        retry_after_seconds({})
        == retry_after_seconds({"Retry-After": "soon"})
        == retry_after_seconds({"Retry-After": "\xb2"})
        == 0
    )


def test_a_lane_reads_over_http_what_it_reads_from_disk(tmp_path):
    written = write_shards(tmp_path, 1, 50)
    with serving(tmp_path) as server:
        lane = make_lane(data_config(f"{server.url}/part-00000.json.gz", shuffle_documents=1), 1, 0)
        tokens = [256]
        while lane.state()["epoch"] == 0:
            tokens += lane.next_block().tokens[1:].tolist()
    found = documents_in(tokens)
    assert found[:50] == written[0]
