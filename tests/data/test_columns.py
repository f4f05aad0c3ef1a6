"""Files with groups of rows (Parquet, Arrow): each row once, every type of string, damage, memory, a bad network."""

import errno
import itertools
import random
import re
from collections import Counter
from contextlib import closing

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_mora.data import columns
from relora_mora.data.content import content_of
from relora_mora.data.errors import SourceError
from relora_mora.data.files import LocalFile
from relora_mora.data.first_rows import check_columns
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards
from tests.tools.data_tools import (
    WRITE_GROUPS,
    data_config,
    documents_in,
    epoch_tokens,
    make_lane,
    resolve_shards,
    rows_of,
    some_texts,
    texts_of,
    write_arrow,
    write_parquet,
)
from tests.tools.each import each
from tests.tools.faulty_server import serving

every_format = each("suffix", WRITE_GROUPS)


@each("group_rows", [1, 7, 1000])
@each("lanes", [1, 3, 8])
@every_format
def test_lanes_that_share_a_file_have_each_row_once_and_can_skip_to_any(suffix, tmp_path, group_rows, lanes):
    texts = some_texts(60)
    path = WRITE_GROUPS[suffix](tmp_path / f"a{suffix}", texts, group_rows=group_rows, column="with.dot")
    found = [rows_of(path, lanes, lane, column="with.dot") for lane in range(lanes)]
    assert Counter(itertools.chain(*found)) == Counter(texts)
    assert all(found)  # with fewer groups than lanes, too
    for lane, own in enumerate(found):
        for skip in (0, 1, 6, 7, len(own) - 1, len(own)):
            assert rows_of(path, lanes, lane, min(skip, len(own)), column="with.dot") == own[skip:]


@each("written", ["stream", "file", "parquet"])
@each("compression", [None, "lz4", "zstd"])
@each("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_format_kind_of_string_and_compression(tmp_path, written, compression, kind):
    texts = [*some_texts(20), None, "", "größer\0", "twice", "twice"]
    values = pyarrow.array(texts, "string")
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
    path = tmp_path / ("a.parquet" if written == "parquet" else "a.arrow")
    if written == "parquet":
        write_parquet(path, values, group_rows=9, compression=compression or "none")
    else:
        write_arrow(path, values, group_rows=9, stream=written == "stream", compression=compression)
    content_of(resolve_shards(str(path)))
    assert texts_of(path) == [text for text in texts if text]
    assert len([row for lane in range(5) for row in rows_of(path, 5, lane)]) == len(texts)


@every_format
def test_rows_without_text_are_counted_by_kind_and_bad_ones_named_by_row(suffix, tmp_path):
    values = pyarrow.array([b"good", None, b"", b"\xff", b"x" * 2000, b"good too"]).view("string")
    path = WRITE_GROUPS[suffix](tmp_path / f"a{suffix}", values, group_rows=2)
    lane = make_lane(data_config(path, max_bad_fraction=1.0, max_line_bytes=1000, shuffle_documents=1), 1, 0)
    if suffix == ".arrow":  # its strings are UTF-8 by definition, so the file is damaged
        with pytest.raises(SourceError, match=r"a\.arrow: group 2, from row 3 on, cannot be read .*UTF8"):
            epoch_tokens(lane)
        return
    assert documents_in(epoch_tokens(lane))[:2] == ["good", "good too"]
    while lane.state()["epoch"] < 2:
        lane.next_block()
    assert set(lane.state()["skipped"]) == {"null_text", "empty_text", "invalid_utf8", "too_long"}
    assert lane.notes[:2] == [
        "a.parquet: row 4 is not text in UTF-8; skipped",
        "a.parquet: row 5 has a length of 2,000, more than data.max_line_bytes (1,000); skipped",
    ]
    with pytest.raises(SourceError, match=r"a\.parquet: 1 of 4 rows are bad, .*data\.max_bad_fraction"):
        epoch_tokens(make_lane(data_config(path, max_bad_fraction=0.0, max_line_bytes=1000), 1, 0))


BYTES = pyarrow.array([b"text"], "binary")
RECORDS = {"kind": "prompt", "columns": {"prompt": "url", "completion": "text"}}
OF_BYTES = 'holds .*binary.* in the column "text", not strings .pyarrow: column.cast'


@each(
    "values,settings,said",
    [
        (["text"], {"text_column": "body"}, 'has no column "body"; set data.text_column to one of id, text, url'),
        (
            ["text"],
            {"text_column": "id"},
            'holds int64 in the column "id", not strings .*; or set data.records, if rows are not plain text',
        ),
        (BYTES, {"records": RECORDS}, OF_BYTES),
        (BYTES.cast("large_binary"), {}, OF_BYTES),
        (BYTES.dictionary_encode(), {}, OF_BYTES),
    ],
)
@every_format
def test_a_column_without_strings_is_refused_with_a_remedy(suffix, tmp_path, values, settings, said):
    config = data_config(WRITE_GROUPS[suffix](tmp_path / f"a{suffix}", values), **settings)
    with pytest.raises(SourceError, match=rf"a\{suffix} {said}"):
        check_columns(configured_shards(config, "train"), config)


@each("cut", [100, 8])  # of a stream, 8 bytes are its end
@every_format
def test_a_file_that_was_cut_is_found_before_training(suffix, tmp_path, cut):
    path = WRITE_GROUPS[suffix](tmp_path / f"a{suffix}", some_texts(100))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(SourceError, match=rf"a\{suffix} is not \w+ or was cut short; fetch or write it again"):
        content_of(resolve_shards(str(path)))
    with pytest.raises(SourceError, match=rf"a\{suffix}: its footer or schema cannot be read .*; fetch or"):
        make_lane(data_config(path), 1, 0).next_block()


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["parquet", "stream", "file"]), at=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_a_file_that_is_cut_or_damaged_anywhere_is_an_error_or_has_all_rows(tmp_path_factory, kind, at, cut):
    """Arrow has no checksums, so another byte of a text is another text."""
    texts = some_texts(60)
    path = tmp_path_factory.mktemp("damaged") / f"a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        write_parquet(path, texts, write_page_checksum=True)
    else:
        write_arrow(path, texts, stream=kind == "stream")
    body = bytearray(path.read_bytes())
    place = int(at * len(body))
    body[place] ^= 255
    path.write_bytes(body[:place] if cut else body)
    try:
        rows = [row for lane in range(2) for row in rows_of(path, 2, lane)]
    except SourceError as error:
        assert re.search(r"a\.\w+(: its|: group \d| has no column| holds)", str(error)), error
        return
    assert len(rows) == 60
    assert not cut
    assert kind != "parquet" or rows == texts


@each("good_reads", [0, 1])
def test_a_disk_that_is_gone_is_an_error_of_the_system(tmp_path, monkeypatch, good_reads):
    path = write_parquet(tmp_path / "a.parquet", [random.Random(n).randbytes(500).hex() for n in range(500)])
    readinto = LocalFile.readinto
    reads = itertools.count()

    def failing(self, buffer):
        if next(reads) >= good_reads:
            raise OSError(errno.EIO, "Input/output error", "a.parquet")
        return readinto(self, buffer)

    monkeypatch.setattr(LocalFile, "readinto", failing)
    with pytest.raises(OSError, match=r"a\.parquet") as caught:
        make_lane(data_config(path), 1, 0).next_block()
    assert caught.value.errno == errno.EIO


def test_a_seek_over_http_costs_few_requests_and_bytes(tmp_path):
    texts = [random.Random(n).randbytes(500).hex() for n in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=200)
    with serving(tmp_path) as server:
        (shard,) = resolve_shards(f"{server.url}/a.parquet")
        with closing(open_rows(data_config(path), shard)) as rows:
            assert rows.skip(1501)
            assert rows.take(400) == texts[1501:1901]
        ranges = [headers["range"] for _, headers in server.requests]
    assert len(ranges) <= 5, ranges
    asked = [[int(place) for place in text.removeprefix("bytes=").split("-")] for text in ranges]
    assert sum(last - first + 1 for first, last in asked) < path.stat().st_size / 2


@every_format
def test_a_large_group_or_file_is_read_a_part_at_a_time(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BATCH_BYTES", 1 << 20)
    texts = [random.Random(n).randbytes(50_000).hex() for n in range(150)]  # 15 MB
    if suffix == ".arrow":
        path = write_arrow(tmp_path / "a.arrow", texts, group_rows=5, stream=False, compression="zstd")
    else:  # pages of 1 MiB, not a single one
        pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
        path = write_parquet(tmp_path / "a.parquet", texts, group_rows=1000, **pages)
    before = pyarrow.total_allocated_bytes()
    most = 0
    with closing(open_rows(data_config(path), Shard(path.name, str(path)))) as rows:
        for text in texts:
            assert rows.take(1) == [text]
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 6e6
