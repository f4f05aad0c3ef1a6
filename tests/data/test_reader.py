"""Lines of damaged and undamaged shards, and what is text."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relora_mora.data import iter_texts, resolve_shards
from relora_mora.data.errors import SourceError
from relora_mora.data.reader import BadLine, ShardLines
from relora_mora.data.sources import Shard
from relora_mora.data.texts import BAD, KINDS, parse_line, surely_bad
from tests.tools.data_tools import data_config, line, some_texts, write_shard
from tests.tools.helpers import ROOT


def _lines(path, limit=1000):
    with ShardLines(Shard(path.name, str(path)), max_line_bytes=limit, timeout_seconds=1.0) as lines:
        return list(lines)


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl.zst"])
def test_every_format_gives_the_same_lines(tmp_path, suffix):
    texts = some_texts(3000)
    path = write_shard(tmp_path / f"a{suffix}", texts)
    assert [json.loads(entry)["text"] for entry in _lines(path)] == texts
    assert list(iter_texts(str(path), split="train", config=data_config(path))) == texts


def test_several_gzip_members_and_zstd_frames(tmp_path):
    (tmp_path / "a.gz").write_bytes(
        gzip.compress(b"one\ntw") + gzip.compress(b"o\n") + gzip.compress(b"") + gzip.compress(b"three") + b"\0" * 9
    )
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b"one\ntw") + zstandard.compress(b"o\nthree"))
    assert _lines(tmp_path / "a.gz") == _lines(tmp_path / "a.zst") == [b"one", b"two", b"three"]


def _skippable(number: int, size: int) -> bytes:
    """A zstd frame to pass over, as pzstd and the seekable format write them (RFC 8878, 3.1.2)."""
    return struct.pack("<II", 0x184D2A50 + number, size) + (b"\x28\xb5\x2f\xfd{\n" * size)[:size]


def _long(text: bytes, window_log: int) -> bytes:
    """As zstd --long writes to a pipe: the window in the header, and not the size of the text."""
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(text) + compressor.flush()


def _gzip_member(text: bytes, flags: int) -> bytes:
    """With the optional fields of RFC 1952 that ``flags`` name: 2 header checksum, 4 extra, 8 name, 16 comment."""
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\x00\x03"
    header += b"\x06\x00BC\x02\x00ab" if flags & 4 else b""
    header += b"name\0" if flags & 8 else b""
    header += b"comment\0" if flags & 16 else b""
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF) if flags & 2 else b""
    return header + gzip.compress(text, mtime=0)[10:]


ZSTD_PARTS = st.one_of(
    st.builds(_skippable, st.integers(0, 15), st.sampled_from([0, 1, 300, 70_000])).map(lambda frame: (frame, b"")),
    st.tuples(st.binary(max_size=300) | st.just(b"line\n" * 40_000), st.integers(10, 31)).map(
        lambda part: (_long(*part), part[0])
    ),
    st.sampled_from([(zstandard.compress(b""), b""), (zstandard.compress(b"on\ne"), b"on\ne")]),
)
GZIP_PARTS = st.tuples(st.binary(max_size=300) | st.just(b"line\n" * 40_000), st.integers(0, 15)).map(
    lambda part: (_gzip_member(part[0], 2 * part[1]), part[0])
)


@settings(max_examples=60, deadline=None)
@given(parts=st.one_of(st.lists(ZSTD_PARTS, min_size=1, max_size=6), st.lists(GZIP_PARTS, min_size=1, max_size=6)))
@example(parts=[(_skippable(0, 5), b""), (zstandard.compress(b"text"), b"text")])
@example(parts=[(_skippable(15, 70_000), b"")])
@example(parts=[(_long(b"text", 31), b"text")])
def test_any_row_of_frames_and_members_is_the_text_in_them(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_bytes(b"".join(frame for frame, _ in parts))
    text = b"".join(text for _, text in parts)
    assert _lines(path, limit=1 << 20) == [*text.split(b"\n")[:-1], *filter(None, [text.split(b"\n")[-1]])]


def test_no_memory_for_the_window_is_no_damage(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(_long(line("text") + b"\n", 31))
    code = f"""
import resource, zstandard
from pathlib import Path
from tests.data.test_reader import _lines
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
_lines(Path({str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    *_, message = done.stderr.splitlines()
    assert (
        "SourceError: a.jsonl.zst: there is no memory for the window" in message
        and "compress it again without --long" in message
    )


@pytest.mark.parametrize("name", ["a.json", "a.gz", "a.zst", "compressed.gz", "compressed.zst"])
@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\xef\xbb\xbf \n\n", b"\n \t\n", b" " * 70_000])
def test_text_behind_a_byte_order_mark_and_blanks_whatever_the_name(tmp_path, name, before):
    path, body = tmp_path / name, before + line("text") + b"\n"
    if name.startswith("compressed"):
        body = gzip.compress(body) if name.endswith(".gz") else zstandard.compress(body)
    path.write_bytes(body)
    assert list(iter_texts(str(path), split="train", config=data_config(path))) == ["text"]


@pytest.mark.parametrize("name", ["a.json", "a.gz", "compressed.gz", "compressed.zst"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_has_a_name(tmp_path, name, encoding):
    path, body = tmp_path / name, b"\n".join(line(text) for text in some_texts(20)).decode().encode(encoding)
    if name.startswith("compressed"):
        body = gzip.compress(body) if name.endswith(".gz") else zstandard.compress(body)
    path.write_bytes(body)
    with pytest.raises(SourceError, match=r"lines are bad.*is UTF-16, not UTF-8 \(iconv -f UTF-16 -t UTF-8\)"):
        list(iter_texts(str(path), split="train", config=data_config(path)))


@pytest.mark.parametrize("suffix", [".json", ".gz", ".zst"])
def test_skipping_is_the_same_as_taking(tmp_path, suffix):
    path = write_shard(tmp_path / f"a{suffix}", some_texts(5000))
    expected = _lines(path)
    with ShardLines(Shard("a", str(path)), max_line_bytes=1000, timeout_seconds=1.0) as lines:
        assert lines.skip(3) and lines.take() == expected[3]
        assert lines.skip(4000) and lines.take() == expected[4004] and lines.row == 4005
        assert lines.skip(994) and not lines.skip(2) and lines.take() is None


@pytest.mark.parametrize("suffix", [".json", ".gz", ".zst"])
def test_a_long_line_is_never_held(tmp_path, suffix):
    # 64 MB on one line, which a compressed shard holds in a few kB
    path = write_shard(tmp_path / f"a{suffix}", [b"first", b"x" * (1 << 26), b"y" * 1000, b"z" * 1001, b"last"])
    tracemalloc.start()
    lines = _lines(path, limit=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [b"first", BadLine("too_long"), b"y" * 1000, BadLine("too_long"), b"last"]
    assert peak < 1 << 25 or suffix == ".zst"  # zstd gives up to 32 MiB at once
    assert peak < 3 << 25


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_shard_that_breaks_off_or_is_damaged(tmp_path, suffix):
    whole = write_shard(tmp_path / f"a{suffix}", some_texts(4000))
    expected, body = _lines(whole), whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(body[: len(body) // 2])
    lines = _lines(cut)
    assert lines[-1] == BadLine("truncated") and 1000 < len(lines) < 3000
    assert lines[:-1] == expected[: len(lines) - 1]
    damaged = tmp_path / f"damaged{suffix}"
    damaged.write_bytes(body[: len(body) // 2] + b"\xff" * 100 + body[len(body) // 2 + 100 :])
    assert isinstance(_lines(damaged)[-1], BadLine) and _lines(damaged) == _lines(damaged)
    damaged.write_bytes(b"junk" + body[4:])
    assert _lines(damaged) == [BadLine("corrupt")]
    damaged.write_bytes(b"")
    assert _lines(damaged) == []


LINES = [
    (line("text"), None),
    (b'{"text": "nul \\u0000 escaped"}', None),
    (b'\xef\xbb\xbf{"text": "after a byte order mark"}', None),
    (b'{"text": "\\ud83d\\ude42"}\r', None),
    (b'{"\\u0074ext": "an escaped key"}', None),
    (b'{"text": "beside", "a": NaN, "b": -Infinity}', None),
    (b'{"text": 3, "text": "the last one counts"}', None),
    (b'{"text": "the last one counts", "text": 3}', "text_not_string"),
    (b"hello", "not_json"),
    (b'{"text": "unfinished', "not_json"),
    (b"[" * 100_000, "not_json"),
    (b'["text"]', "no_text"),
    (b'"text"', "no_text"),
    (b'{"body": "x"}', "no_text"),
    (b'{"text": null}', "text_not_string"),
    (b'{"text": ["a"]}', "text_not_string"),
    (b'{"text": "\xff"}', "invalid_utf8"),
    (b'{"text": "\\ud83d alone"}', "invalid_utf8"),
    (b'{"text": "a\0b"}', "raw_nul"),
    (b'{"text": ""}', "empty_text"),
    (b" \t\r", "blank_line"),
    (BadLine("too_long"), "too_long"),
    (BadLine("truncated"), "truncated"),
]


@pytest.mark.parametrize("entry,expected", LINES)
def test_kinds_of_lines(entry, expected):
    text, kind = parse_line(entry)
    assert kind == expected and (text is None) == (expected is not None)
    assert not surely_bad(entry) or kind in BAD


@given(st.one_of(st.binary(max_size=40), st.text('{}[]"text:\\u0041 \v\u00a0\ufeff', max_size=30).map(str.encode)))
def test_only_bad_lines_are_surely_bad(entry):
    text, kind = parse_line(entry)
    assert (text is None) or kind is None
    assert kind is None or kind in KINDS
    if surely_bad(entry):
        assert kind in BAD


def test_an_unreadable_file(tmp_path):
    with pytest.raises(SourceError, match=r"gone\.json cannot be read \(No such file"):
        ShardLines(Shard("gone.json", str(tmp_path / "gone.json")), max_line_bytes=9, timeout_seconds=1.0)


@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_file_that_changes_while_it_is_read_stops_at_once(tmp_path, change):
    path = write_shard(tmp_path / "a.json", some_texts(20_000))
    (shard,) = resolve_shards(str(path))
    message = r"a\.json changed since the start: [\d,]+ bytes then, [\d,]+ now; start with data that does not change"
    with ShardLines(shard, max_line_bytes=1000, timeout_seconds=1.0) as lines:
        assert lines.skip(100)
        os.truncate(path, path.stat().st_size + change)
        with pytest.raises(SourceError, match=message):
            lines.skip(20_000)
    with pytest.raises(SourceError, match=message):  # and so does one that is another at the next epoch
        ShardLines(shard, max_line_bytes=1000, timeout_seconds=1.0)
