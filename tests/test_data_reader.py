"""Lines of damaged and undamaged shards, and what is text."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from relora_mora.data import iter_texts
from relora_mora.data.reader import BadLine, ShardLines
from relora_mora.data.sources import Shard, SourceError
from relora_mora.data.texts import BAD, KINDS, parse_line, surely_bad
from tests.data_tools import data_config, line, some_texts, write_shard


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
