"""Which lines, documents and rows of CSV hold a text, and the reasons why others do not."""

import csv
import gzip
import io
import json
import tracemalloc
from contextlib import closing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relora_mora.data.errors import SKIP_REASONS, Skipped, SourceError
from relora_mora.data.first_rows import check_columns
from relora_mora.data.lines import read_json
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, line, resolve_shards, rows_of, some_texts, texts_of, write_shard
from tests.tools.each import each


def _read(entry):
    return read_json(entry, Shard("a.json", "a.json"))


@each(
    "entry,expected",
    [
        (line("text"), None),
        (b'{"text": "nul \\u0000 escaped"}', None),
        (b'\xef\xbb\xbf{"text": "after a byte order mark"}', None),
        (b'{"text": "\\ud83d\\ude42"}\r', None),
        (b'{"\\u0074ext": "an escaped key"}', None),
        (b'{"text": "beside", "a": NaN, "b": -Infinity}', None),
        (b'{"text": "beside", "a": "\\ud83d alone"}', None),
        (b'{"text": 3, "text": "the last one counts"}', None),
        (b'{"text": "the last one counts", "text": 3}', "text_not_string"),
        (b"hello", "not_json"),
        (b'{"text": "unfinished', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'["text"]', "no_text"),
        (b'{"body": "x"}', "no_text"),
        (b'{"text": null}', "null_text"),
        (b'{"text": "a", "n": ' + b"1" * 4300 + b"}", None),
        (b'{"text": "a", "n": [' + b"1" * 4301 + b"]}", "not_json"),
        (b'{"text": ["a"]}', "text_not_string"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": "\\ud83d alone"}', "invalid_utf8"),
        (b'{"text": "a\0b"}', "not_json"),
        (b'{"text": ""}', "empty_text"),
        (b" \t\r", "blank_line"),
    ],
)
def test_every_reason(entry, expected):
    row = _read(entry)
    assert row == Skipped(expected) if expected else isinstance(row, str) and row


@given(st.one_of(st.binary(max_size=40), st.text('{}[]"text:\\u0041 \v\u00a0\ufeff', max_size=30).map(str.encode)))
def test_any_line_is_a_text_or_has_a_reason(entry):
    row = _read(entry)
    assert isinstance(row, str) or row.reason in SKIP_REASONS


@each("indent", [None, 1])
def test_one_array_in_json_is_one_message_before_training(tmp_path, indent):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"text": text} for text in some_texts(20)], indent=indent).encode()))
    with pytest.raises(SourceError, match=r"gz is one JSON array, .*: jq -c '\.\[\]' OLD\.json > NEW\.jsonl"):
        check_columns(resolve_shards(str(path)), data_config(path))


# ---- text ------------------------------------------------------------------------------------------------------------

BODY = b"\xef\xbb\xbf  first line\r\nsecond\r\n\r\n \t\r\nthird\n\n\nthe last"
DOCUMENTS = {
    "line": ["  first line", "second", "third", "the last"],
    "paragraph": ["  first line\nsecond", "third", "the last"],
    "document": ["  first line\nsecond\n\n \t\nthird\n\n\nthe last"],
}


@each("sample_by", DOCUMENTS)
@each("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_text_is_split_into_documents(tmp_path, sample_by, end):
    (tmp_path / "a.txt").write_bytes(BODY + end)
    expected = list(DOCUMENTS[sample_by])
    if sample_by == "document" and end == b"\n\n":
        expected[-1] += "\n"  # only the last newline belongs to no line
    assert texts_of(tmp_path / "a.txt", sample_by=sample_by) == expected


@each("sample_by", ["paragraph", "document"])
def test_a_long_document_is_never_held_in_memory(tmp_path, sample_by):
    path = write_shard(
        tmp_path / "a.txt", ["first", f"{'many words on a line':200}\n".encode() * 20_000 + b"end", "last"]
    )
    tracemalloc.start()
    rows = rows_of(path, sample_by=sample_by, max_line_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    too_long = Skipped("too_long")
    assert rows == (["first", too_long, "last"] if sample_by == "paragraph" else [too_long])
    assert peak < 1 << 22
    path = write_shard(tmp_path / "b.txt", ["é\n" * 9 + "é", "é\n" * 9 + "éx"])
    assert rows_of(path, max_line_bytes=29) == ["é\n" * 9 + "é", Skipped("too_long")]  # the limit is on bytes


@each(
    "sample_by,blank_rows",
    {"document": ["blank_line"], "paragraph": [], "line": ["blank_line", "empty_text", "blank_line"]}.items(),
)
def test_files_without_text(tmp_path, sample_by, blank_rows):
    for body in (b"", b" \n\n\t\n"):
        (tmp_path / "a.txt").write_bytes(body)
        assert rows_of(tmp_path / "a.txt", sample_by=sample_by) == [Skipped(reason) for reason in blank_rows if body]
    (tmp_path / "a.txt").write_text("text in UTF-16\n\nand more", encoding="utf-16")
    assert Skipped("invalid_utf8") in rows_of(tmp_path / "a.txt", sample_by=sample_by)
    with pytest.raises(SourceError, match=r"a\.txt: 1 of 1 \w+s are bad, .*holds a NUL byte"):
        texts_of(tmp_path / "a.txt", max_bad_fraction=0.0, sample_by=sample_by)


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _written(row, end):
    out = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if "\r" in row[1] else csv.QUOTE_MINIMAL  # before Python 3.13 it forgot to
    csv.writer(out, lineterminator=end, quoting=quoting).writerow(row)
    return out.getvalue().encode()


@pytest.mark.more
@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text('ab",\r\n é', max_size=25), min_size=1, max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
    limit=st.sampled_from([12, 20, 1000]),
    lanes=st.integers(1, 3),
    skip=st.integers(0, 2),
)
def test_text_written_by_csv_is_read_back(tmp_path_factory, texts, end, limit, lanes, skip):
    rows = [_written([n, text, "x"], end) for n, text in enumerate(texts)]
    # beyond the limit the end of a row is not known
    assume(all(len(row) - 1 <= limit or b"\n" not in row[:-2] for row in rows))
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(_written(["id", "text", ""], end) + b"".join(rows))
    expected = [
        Skipped("too_long") if len(row) - 1 > limit else text or Skipped("empty_text")
        for row, text in zip(rows, texts, strict=True)
    ]
    for lane in range(lanes):
        own = expected[lane::lanes]
        start = min(skip, len(own))
        assert rows_of(path, lanes, lane, start, max_line_bytes=limit) == own[start:]


def test_a_text_longer_than_the_default_limit_of_csv(tmp_path):
    path = write_shard(tmp_path / "a.csv", ["x" * 200_000, "y"])
    assert rows_of(path) == ["x" * 200_000, "y"]


LOST = "".join(f"lost {n},2\n" for n in range(50))


@each(
    "limit,lines,bad,last",
    [
        (1000, LOST, 51, []),
        (1000, LOST + '"ok",3\nlast,4\n', 52, ["last"]),
        (50, LOST, 6, [f"lost {n}" for n in range(5, 50)]),
    ],
)
def test_an_open_quote_makes_every_line_up_to_the_next_one_or_the_limit_bad(tmp_path, limit, lines, bad, last):
    """This shows the limit on bad rows how much of the file is lost."""
    path = tmp_path / "a.csv"
    path.write_text('text,id\nfirst,0\n"open,1\n' + lines)
    first, *rows = rows_of(path, max_line_bytes=limit)
    assert first == "first"
    assert {row.reason for row in rows[:bad]} == ({"not_csv"} if limit == 1000 else {"too_long", "not_csv"})
    assert rows[bad:] == last


@each("bom", [b"", b"\xef\xbb\xbf"])
@each("head", [b'"text",id\r\n', b"\n\nid,text"])
def test_the_header(tmp_path, bom, head):
    path = tmp_path / "a.csv"
    path.write_bytes(bom + head + b'\r\nx 5" disk,x 5" disk\r\n"1","1"')
    assert [row for row in rows_of(path) if isinstance(row, str)] == ['x 5" disk', "1"]


@each(
    "body,message",
    [
        (b"id,body,url\n", 'has no column "text"; set data.text_column to one of id, body, url'),
        ("größe,x\n".encode(), 'has no column "text"; set data.text_column to one of größe, x'),
        (b"text,id,text\n", 'has 2 columns "text"; set data.text_column to one of text, id, text'),
        ("id,text\n".encode("utf-16"), "its header holds a NUL byte, as UTF-16 does; repair or drop it"),
        (b"id;text\n", 'has no column "text"; set data.text_column to one of id;text'),
        (b'"text\n', "its header is not CSV; repair or drop it"),
    ],
)
def test_a_wrong_header_is_found_before_training(tmp_path, body, message):
    path = tmp_path / "a.csv"
    path.write_bytes(body + b"1,2,3\n")
    with pytest.raises(SourceError) as caught:
        check_columns(resolve_shards(str(path)), data_config(path))
    assert f"a.csv{':' * message.startswith('its')} {message}" in str(caught.value)


@each("body", [b"", b"\n\n", b"id,text", b"id,text\n"])
def test_a_file_without_rows_is_empty(tmp_path, body):
    path = tmp_path / "a.csv"
    path.write_bytes(body)
    config = data_config(path)
    check_columns(resolve_shards(str(path)), config)
    notes = []
    with closing(open_rows(config, Shard("a.csv", str(path)), note=notes.append)) as rows:
        assert rows.take(1) == []
        assert rows.is_empty
    assert notes == ["a.csv is empty; skipped"]
