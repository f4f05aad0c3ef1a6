"""Samples of the text are enough to notice other text under the same names and sizes."""

import gzip
import os
import random
import shutil
from contextlib import closing

import pytest
import zstandard

from relora_mora.data.content import content_of, with_versions
from relora_mora.data.errors import SourceError
from relora_mora.data.read import open_rows
from tests.tools.data_tools import data_config, resolve_shards, some_texts, write_shard, write_shards
from tests.tools.each import each
from tests.tools.faulty_server import serving

pytestmark = pytest.mark.usefixtures("short_waits")


def _local(path) -> str:
    return content_of(resolve_shards(str(path)))


def _remote(server) -> str:
    return content_of(with_versions(resolve_shards(f"{server.url}/part-{{00000..00002}}.json.gz"), 8.0))


def test_it_depends_on_the_content_of_files_and_not_on_their_location(tmp_path):
    for folder in ("here", "there"):
        write_shards(tmp_path / folder, 3, 20)
    first = _local(tmp_path / "here" / "*")
    assert len(first) == 32
    assert _local(tmp_path / "there" / "*") == first
    path = tmp_path / "there" / "part-00001.json.gz"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1  # a small file is read as a whole
    path.write_bytes(body)
    assert _local(tmp_path / "there" / "*") != first
    path.rename(path.with_name("part-00009.json.gz"))
    assert len({first, _local(tmp_path / "there" / "*"), _local(path.parent / "part-00000.json.gz")}) == 3
    assert content_of([]) == ""


def test_samples_of_a_large_file_notice_any_change_of_compressed_text(tmp_path):
    """Its end has a checksum of all text. A change in the middle of plain text may be missed."""
    text = random.Random(0).randbytes(1 << 19).hex().encode()
    other = bytearray(text)
    other[len(text) // 2] ^= 1
    compressed = {  # stored, so that the change moves nothing; zstd's command line writes a checksum
        "json": bytes,
        "gz": lambda data: gzip.compress(data, 0, mtime=0),
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    found = {}
    for suffix, compress in compressed.items():
        for name, data in {"text": text, "other": other, "begin": b"x" + text[1:], "end": text[:-1] + b"x"}.items():
            (tmp_path / f"a.{suffix}").write_bytes(compress(bytes(data)))
            found[suffix, name] = _local(tmp_path / f"a.{suffix}")
    assert found["json", "other"] == found["json", "text"]
    assert len(set(found.values())) == len(found) - 1


def test_a_server_reports_versions_by_etag_or_date_and_size(tmp_path):
    write_shards(tmp_path, 3, 20)
    (tmp_path / "part-00001.json.gz").write_bytes(b"")
    with serving(tmp_path) as server:
        found = [_remote(server), _remote(server)]
        server.last_modified = "Tue, 24 Nov 2026 12:00:00 GMT"
        assert _remote(server) == found[0]  # only the ETag counts
        path = tmp_path / "part-00002.json.gz"
        path.write_bytes(bytes(reversed(path.read_bytes())))
        found.append(_remote(server))
        server.etag = False
        found += [_remote(server), _remote(server)]
        server.last_modified = "Tue, 24 Nov 2026 12:00:01 GMT"
        found.append(_remote(server))
        path.write_bytes(path.read_bytes() + b"more")
        found.append(_remote(server))
        assert all(headers.get("range") == "bytes=0-0" for _, headers in server.requests)
    assert [found.index(one) for one in found] == [0, 0, 2, 3, 3, 5, 6]


def _texts(shard):
    with closing(open_rows(data_config("unused"), shard)) as rows:
        return rows.take(9)


@each("suffix", [".json.gz", ".parquet"])
@each("etag", [True, False])
def test_files_are_read_in_the_version_that_was_asked_for(tmp_path, suffix, etag):
    path = write_shard(tmp_path / f"a{suffix}", some_texts(8))
    with serving(tmp_path, etag=etag) as server:
        server.last_modified = "Tue, 24 Nov 2026 12:00:00 GMT"
        (shard,) = with_versions(resolve_shards(f"{server.url}/a{suffix}"), 8.0)
        assert _texts(shard) == some_texts(8)
        write_shard(path, some_texts(9))
        server.last_modified = "Tue, 24 Nov 2026 12:00:01 GMT"
        with pytest.raises(SourceError, match=rf"a\{suffix} changed while it was read"):
            _texts(shard)


@each("suffix", [".json.gz", ".txt", ".parquet"])
def test_a_local_file_is_read_as_it_was_at_the_start_and_copies_of_it_are_the_same(tmp_path, suffix):
    path = write_shard(tmp_path / f"a{suffix}", some_texts(8))
    (shard,) = resolve_shards(str(path))
    before = path.stat()
    shutil.copy2(path, tmp_path / "copy").replace(path)  # like rsync and backups, this keeps the time
    assert _texts(shard) == some_texts(8)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(SourceError, match=rf"a\{suffix} was written since the start; use data that does not"):
        _texts(shard)
    assert _texts(resolve_shards(str(path))[0]) == some_texts(8)  # another start accepts the file as it is now
