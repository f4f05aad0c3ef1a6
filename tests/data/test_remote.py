"""Over http and in stores a fault that passes changes no byte, and a fault that stays is one clear error."""

import random
import threading
import time
from contextlib import closing
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from relora_mora.data import network
from relora_mora.data.content import content_of, with_versions
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns
from relora_mora.data.network import RETRIES, BlockFile, TransientError, retrying
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, resolve_shards, rows_of, some_texts, write_shard
from tests.tools.each import each
from tests.tools.faulty_server import FAULTS, serving

pytestmark = pytest.mark.usefixtures("short_waits")


def _write(folder):
    """A file of 480 kB."""
    return write_shard(folder / "a.json.gz", [random.Random(n).randbytes(60).hex() for n in range(6000)])


def _read(server, timeout_seconds=8.0):
    return BlockFile(Shard("a.json.gz", f"{server.url}/a.json.gz"), timeout_seconds).readall()


@each("ranges", [True, False])
def test_an_empty_file_and_a_server_without_ranges(tmp_path, ranges):
    path = tmp_path / "a.json.gz"
    path.write_bytes(b"")
    with serving(tmp_path, ranges=ranges) as server:
        assert _read(server) == b""
        if not ranges:
            _write(tmp_path)
            server.requests.clear()
            with pytest.raises(SourceError, match=r"a\.json\.gz: the server answers no ranges; download the file"):
                _read(server)
            assert len(server.requests) == 1


@pytest.mark.more
@each("fault", FAULTS)
def test_each_fault_twice(tmp_path, fault, monkeypatch):
    if fault != "stall":  # a busy machine may be silent for the time that counts as a stall in tests
        monkeypatch.setattr(network, "STALL_SECONDS", 30.0)
    shard = _write(tmp_path)
    before = RETRIES.retries
    began = time.monotonic()
    with serving(tmp_path, lambda n: fault if n in (0, 2) else None) as server:
        assert _read(server, timeout_seconds=4.0 if fault == "stall" else 60.0) == shard.read_bytes()
        assert set(server.faults) == {fault}
        # a length that is too long is no fault of an answer whose range says how much follows
        retries = RETRIES.retries - before
        assert retries >= 2 if fault == "stall" else retries == (0 if fault == "long" else 2)
    if fault == "429":
        assert time.monotonic() - began > 2  # Retry-After: 1, twice


@each("proxy", ["socks5://127.0.0.1:1080", "http://[secret"])
def test_a_proxy_that_cannot_be_used_is_named(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(SourceError, match="its url, login or proxy cannot be used") as raised:
        BlockFile(Shard("a", "http://example.org/a.json"), 0.5)
    assert "secret" not in str(raised.value)


@each("status,message", [(404, "status 404"), (403, "access denied"), (401, "access denied")])
def test_a_lasting_fault_is_not_retried(tmp_path, status, message, monkeypatch):
    with serving(tmp_path) as server:
        monkeypatch.setattr(server.RequestHandlerClass, "_file", lambda self, *_: self._answer(status, b"", {}))
        with pytest.raises(SourceError, match=message):
            _read(server)
        assert len(server.requests) == 1


def test_waits_double_with_jitter_up_to_a_bound_and_honor_retry_after(monkeypatch):
    monkeypatch.setattr(network, "FIRST_WAIT_SECONDS", 0.25)
    monkeypatch.setattr(network, "LONGEST_WAIT_SECONDS", 30.0)
    busy = TransientError("busy")

    def waits_of(*errors):
        left = iter(errors)
        waits = []
        monkeypatch.setattr(network, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))

        def ask():
            for error in left:
                raise error

        retrying(ask, "a", 1e6)
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


# ---- stores, by fsspec's store in memory -----------------------------------------------------------------------------


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def _rows(url, skip=0, timeout_seconds=20.0):
    [shard] = with_versions(resolve_shards(url), timeout_seconds)
    with closing(open_rows(data_config(url, timeout_seconds=timeout_seconds), shard)) as rows:
        rows.skip(skip)
        return [row for part in iter(lambda: rows.take(50), []) for row in part]


@each("suffix", [".jsonl", ".json.gz", ".jsonl.zst", ".csv.gz", ".txt", ".parquet"])
@each("faults", [0.0, 0.3])
def test_every_format_in_a_store_gives_the_rows_of_a_disk(tmp_path, store, monkeypatch, suffix, faults):
    monkeypatch.setattr("relora_mora.data.network.FIRST_BLOCK_BYTES", 1 << 10)
    path = write_shard(tmp_path / f"a{suffix}", some_texts(400))
    store.pipe(f"/bucket/a{suffix}", path.read_bytes())
    draw = random.Random(suffix)
    cat_file = MemoryFileSystem.cat_file

    def faulty(self, *given, **named):
        kind = draw.choice(["error", "short", "empty"]) if draw.random() < faults else None
        if kind == "error":
            raise ConnectionError("secret://address")
        return cat_file(self, *given, **named)[: {"short": -7, "empty": 0}.get(kind)]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", faulty)
    before = RETRIES.retries
    for skip in (0, 123):
        assert _rows(f"memory://bucket/a{suffix}", skip) == rows_of(path, skip=skip)
    assert (RETRIES.retries > before) == bool(faults)


def test_a_file_in_a_store_that_changes_is_refused_and_has_another_fingerprint(store):
    store.pipe("/bucket/empty.jsonl", b"")
    assert _rows("memory://bucket/empty.jsonl") == []
    store.pipe("/bucket/a.jsonl", b'{"text": "before"}\n')
    shards = resolve_shards("memory://bucket/a.jsonl")
    before = with_versions(shards, 1.0)
    store.pipe("/bucket/a.jsonl", b'{"text": "after"}\n')
    assert content_of(before) != content_of(with_versions(shards, 1.0))
    with pytest.raises(SourceError, match=r"a\.jsonl changed while it was read"):
        open_rows(data_config("memory://bucket/a.jsonl"), before[0])


def test_the_first_rows_of_several_folders_are_asked_for_at_the_same_time(store, monkeypatch):
    urls = ["memory://bucket/1/a.jsonl", "memory://bucket/2/a.jsonl"]
    store.pipe(dict.fromkeys(urls, b'{"text": "a"}\n'))
    both = threading.Barrier(2)
    monkeypatch.setattr(BlockFile, "readinto", lambda *_: both.wait(20) and 0)
    check_columns(resolve_shards(urls), data_config(urls))


@each(
    "name,error,said",
    [
        ("memory://bucket/gone.jsonl", None, r"memory://bucket/gone\.jsonl: the store has no such file"),
        ("memory://bucket/folder", None, r"folder: the store has no such file; .* name files"),
        ("nowhere://bucket/a.jsonl", None, r"nowhere:// cannot be read \(Protocol not known"),
        ("s9://bucket/a.jsonl", None, r"s9:// cannot be read \(Install s9fs\)"),
        ("memory://bucket/a.jsonl", PermissionError("key"), "access denied; check the store's login"),
        ("memory://bucket/a.jsonl", KeyError("key"), r"after 0\.2 s .*KeyError"),
    ],
)
def test_what_is_wrong_with_a_store_is_named_with_a_remedy(store, monkeypatch, name, error, said):
    monkeypatch.setitem(known_implementations, "s9", {"class": "s9fs.S9", "err": "Install s9fs"})
    store.pipe("/bucket/folder/a.jsonl", b"")
    if error is not None:
        monkeypatch.setattr(MemoryFileSystem, "info", Mock(side_effect=error))
    with pytest.raises(SourceError, match=said):
        _rows(name, timeout_seconds=0.2)
