"""CSV: the output of csv is read back, rows of any length keep their place, and a wrong header is one message."""

from __future__ import annotations

import csv
import io
from contextlib import closing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.read import open_rows
from relora_mora.data.sets.check import check_columns
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, resolve_shards, rows_of, write_shard
from tests.tools.each import each


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
    # a longer line is not kept, so the end of its row is not known
    assume(all(len(line) <= limit for row in rows for line in row.split(b"\n")))
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


@each(
    "lines,bad,last",
    [("".join(f"lost {n},2\n" for n in range(5)), 6, []), ("lost,2\n" * 50 + '"ok",3\nlast,4\n', 52, ["last"])],
)
def test_an_open_quote_makes_every_line_up_to_the_next_one_bad(tmp_path, lines, bad, last):
    """This shows the limit on bad rows how much of the file is lost."""
    path = tmp_path / "a.csv"
    path.write_text('text,id\nfirst,0\n"open,1\n' + lines)
    assert rows_of(path) == ["first", *[Skipped("not_csv")] * bad, *last]


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
        ("id,text\n".encode("utf-16"), 'has no column "text"; set data.text_column to one of'),
        (b"id;text\n", 'has no column "text"; set data.text_column to one of id;text'),
        (b'"text\n', "its header is not CSV; the first row of CSV names the columns: repair or drop the file"),
    ],
)
def test_a_wrong_header_is_found_before_training(tmp_path, body, message):
    path = tmp_path / "a.csv"
    path.write_bytes(body + b"1,2,3\n")
    with pytest.raises(SourceError) as caught:
        check_columns(resolve_shards(str(path)), data_config(path))
    assert f"a.csv{':' * message.startswith('its')} {message}" in str(caught.value)
    with pytest.raises(SourceError) as again:
        rows_of(path)
    assert str(again.value) == str(caught.value)


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
