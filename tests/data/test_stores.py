"""Files in stores of fsspec, by its store in memory: the same rows as on a disk, whatever fails on the way."""

from __future__ import annotations

import random
from contextlib import closing

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from relora_mora.data.content import at_versions, content_of, remote_versions
from relora_mora.data.errors import SourceError
from relora_mora.data.network import RETRIES
from relora_mora.data.read import open_rows
from tests.tools.data_tools import data_config, resolve_shards, rows_of, some_texts, write_shard
from tests.tools.each import each

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def _rows(url, skip=0, timeout_seconds=20.0, versions=True):
    shards = resolve_shards(url)
    if versions:
        shards = at_versions(shards, remote_versions(shards, timeout_seconds))
    config = data_config(url, timeout_seconds=timeout_seconds)
    with closing(open_rows(config, shards[0])) as rows:
        rows.skip(skip)
        return [row for part in iter(lambda: rows.take(50), []) for row in part]


@each("suffix", [".jsonl", ".json.gz", ".jsonl.zst", ".csv.gz", ".txt", ".parquet"])
@each("faults", [0.0, 0.3])
def test_every_format_gives_the_rows_of_a_disk(tmp_path, store, monkeypatch, suffix, faults):
    monkeypatch.setattr("relora_mora.data.remote.FIRST_BLOCK_BYTES", 1 << 10)
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


def test_a_file_that_changes_is_refused_and_has_another_fingerprint(store):
    store.pipe("/bucket/a.jsonl", b'{"text": "before"}\n')
    shards = resolve_shards("memory://bucket/a.jsonl")
    before = at_versions(shards, remote_versions(shards, 1.0))
    store.pipe("/bucket/a.jsonl", b'{"text": "after"}\n')
    assert content_of(before) != content_of(at_versions(shards, remote_versions(shards, 1.0)))
    with pytest.raises(SourceError, match=r"a\.jsonl changed while it was read"):
        open_rows(data_config("memory://bucket/a.jsonl"), before[0])


@each(
    "url,said",
    [
        ("memory://bucket/gone.jsonl", r"memory://bucket/gone\.jsonl: the store has no such file"),
        ("memory://bucket/*.jsonl", "stores are not listed; write a range"),
        ("nowhere://bucket/a.jsonl", r"nowhere:// cannot be read .* s3://"),
        ("s9://bucket/a.jsonl", r"s9:// cannot be read \(Install s9fs\)"),
        ("memory://bucket/empty.jsonl", None),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(store, monkeypatch, url, said):
    monkeypatch.setitem(known_implementations, "s9", {"class": "s9fs.S9", "err": "Install s9fs"})
    store.pipe("/bucket/empty.jsonl", b"")
    if said is None:
        assert _rows(url, versions=False) == []
        return
    with pytest.raises(SourceError, match=said):
        _rows(url)


@each(
    "error,said",
    [(PermissionError("key"), "access denied; check the store's login"), (KeyError("key"), r"after 0\.2 s .*KeyError")],
)
def test_a_store_that_refuses(store, monkeypatch, error, said):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(SourceError, match=said):
        _rows("memory://bucket/a.jsonl", timeout_seconds=0.2)
