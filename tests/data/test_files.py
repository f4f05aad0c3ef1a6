"""The text of plain, compressed and damaged files, and samples and versions that notice another file."""

import errno
import gzip
import io
import os
import random
import shutil
import struct
from contextlib import closing

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relora_mora.data.content import content_of, with_versions
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.files import open_file, open_text
from relora_mora.data.lines import documents, lines_in
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Shard
from tests.tools.data_tools import (
    data_config,
    line,
    resolve_shards,
    some_texts,
    texts_of,
    write_shard,
    write_shards,
)
from tests.tools.each import each
from tests.tools.faulty_server import serving


def _skippable(number: int, size: int) -> bytes:
    """A skippable zstd frame, as pzstd and the seekable format write them (RFC 8878, 3.1.2)."""
    return struct.pack("<II", 0x184D2A50 + number, size) + (b"\x28\xb5\x2f\xfd{\n" * size)[:size]


def _long(text: bytes, window_log: int) -> bytes:
    """The output of zstd --long to a pipe: its header holds the window, but not the size of the text."""
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(text) + compressor.flush()


TEXTS = st.binary(max_size=300) | st.just(b"line\n" * 40_000)
ZSTD_PARTS = st.one_of(
    st.builds(_skippable, st.integers(0, 15), st.sampled_from([0, 1, 300, 70_000])).map(lambda frame: (frame, b"")),
    st.tuples(TEXTS, st.integers(10, 31)).map(lambda part: (_long(*part), part[0])),
    st.sampled_from([(zstandard.compress(b""), b""), (zstandard.compress(b"on\ne"), b"on\ne")]),
)
GZIP_PARTS = TEXTS.map(lambda text: (gzip.compress(text, mtime=0), text))


@settings(max_examples=20, deadline=None)
@given(parts=st.one_of(st.lists(ZSTD_PARTS, min_size=1, max_size=6), st.lists(GZIP_PARTS, min_size=1, max_size=6)))
@example(parts=[(_skippable(0, 5), b""), (zstandard.compress(b"text"), b"text")])
@example(parts=[(_skippable(15, 70_000), b"")])
@example(parts=[(_long(b"text", 31), b"text")])
def test_any_sequence_of_frames_and_members_gives_their_text(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_bytes(b"".join(frame for frame, _ in parts))
    text = b"".join(text for _, text in parts)
    shard = Shard("a.json", str(path))
    with closing(open_file(shard, 1.0)) as file:
        assert open_text(file, shard).read() == text


@each("name", ["a.json", "a.gz", "a.zst", "compressed.gz", "compressed.zst"])
@each("before", [b"\xef\xbb\xbf", b"\xef\xbb\xbf \n\n", b"\n \t\n", b" " * 70_000])
def test_text_after_a_byte_order_mark_and_blanks_for_any_file_name(tmp_path, name, before):
    path = tmp_path / name
    body = before + line("text") + b"\n"
    if name.startswith("compressed"):
        body = gzip.compress(body) if name.endswith(".gz") else zstandard.compress(body)
    path.write_bytes(body)
    assert texts_of(path) == ["text"]


@given(text=st.text("a\n\r 日", max_size=60).map(str.encode), buffer=st.integers(1, 9), limit=st.integers(0, 12))
def test_lines_and_documents_are_the_same_however_the_text_arrives(text, buffer, limit):
    def lines_of(text):
        return lines_in(io.BufferedReader(io.BytesIO(text), buffer), limit)

    *lines, last = text.split(b"\n")
    expected = [line if len(line) <= limit else len(line) for line in [*lines, *filter(None, [last])]]
    assert list(lines_of(text)) == expected
    [whole] = list(documents(lines_of(text), 1000, "document")) or [b""]
    if not any(isinstance(line, int) for line in expected):
        assert whole == b"\n".join(line.removesuffix(b"\r") for line in expected)


@each("suffix", [".json.gz", ".json.zst", ".txt.gz", ".csv.zst"])
def test_a_shard_that_breaks_off_or_has_another_byte_anywhere_is_an_error(tmp_path, suffix):
    """With the checksum of its text that the command lines of gzip and zstd write."""
    path = tmp_path / f"a{suffix}"
    texts = some_texts(3)
    body = write_shard(path.with_suffix(""), texts).read_bytes()
    compress = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    body = compress(body)
    for at in [*range(0, len(body), 7), len(body) - 1]:
        path.write_bytes(body[:at])
        with pytest.raises(SourceError, match=rf"a{suffix}: its compressed data breaks off at byte {at}; "):
            texts_of(path, max_bad_fraction=1.0)
        path.write_bytes(body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :])
        try:
            assert texts_of(path) == texts
        except SourceError:
            continue


def test_too_many_lanes_for_the_files_that_may_be_open():
    error = unreadable("a.json", OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "check the path")
    assert "raise ulimit -n, or lower data.lanes" in str(error)


# ---- samples and versions --------------------------------------------------------------------------------------------


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
