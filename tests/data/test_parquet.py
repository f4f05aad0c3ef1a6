"""Parquet: the text column alone, each row once, resumed without reading what is behind, exact over a bad network."""

from __future__ import annotations

import errno
import itertools
import random
import subprocess
import sys
from collections import Counter
from contextlib import closing

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from relora_mora.data import TrainStream, check_columns, iter_texts, local_content, resolve_shards, retry, transport
from relora_mora.data import parquet as parquet_module
from relora_mora.data.errors import SourceError
from relora_mora.data.local import LocalFile
from relora_mora.data.plain_text import open_texts
from relora_mora.data.retry import RETRIES
from relora_mora.data.skipped import Skipped
from relora_mora.data.sources import Shard
from tests.tools.data_tools import (
    assert_resumes_anywhere,
    data_config,
    documents_in,
    epoch_tokens,
    make_lane,
    some_texts,
    write_parquet,
)
from tests.tools.faulty_server import FAULTS, serving


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(retry, "LONGEST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(transport, "STALL_SECONDS", 0.2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _rows(path, lanes=1, lane=0, skip=0, **settings):
    """All rows of a lane's share of a file behind the first ``skip``."""
    config = data_config(path, **settings)
    with closing(open_texts(config, Shard(path.name, str(path)), stride=lanes, phase=lane)) as rows:
        assert rows.skip(skip)
        return [row for part in iter(lambda: rows.take(5), []) for row in part]


def _damaged(path, at, count=1):
    body = bytearray(path.read_bytes())
    body[at : at + count] = bytes(byte ^ 255 for byte in body[at : at + count])
    path.write_bytes(bytes(body))
    return path


@pytest.mark.parametrize("group_rows", [1, 7, 1000])
@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_lanes_that_share_a_file_have_each_row_once_and_get_to_any(tmp_path, group_rows, lanes):
    texts = some_texts(60)
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=group_rows)
    found = [_rows(path, lanes, lane) for lane in range(lanes)]
    assert Counter(itertools.chain(*found)) == Counter(texts)
    assert all(found)  # with fewer groups than lanes, too
    for lane, own in enumerate(found):
        for skip in (0, 1, 6, 7, len(own) - 1, len(own)):
            assert _rows(path, lanes, lane, min(skip, len(own))) == own[skip:]


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_every_kind_of_string_and_compression(tmp_path, kind, compression):
    texts = [*some_texts(20), None, "", "größer\0", "twice", "twice"]
    values = pyarrow.array(texts, "string")
    values = values.cast(kind) if isinstance(kind, str) else values.dictionary_encode()
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=9, compression=compression)
    kept = {None: Skipped("null_text"), "": Skipped("empty_text")}
    for lanes in (1, 5):
        found = [row for lane in range(lanes) for row in _rows(path, lanes, lane)]
        assert Counter(map(str, found)) == Counter(str(kept.get(text, text)) for text in texts)


def test_rows_without_text_are_counted_by_kind_and_bad_ones_told_by_their_row(tmp_path):
    values = pyarrow.array([b"good", None, b"", b"\xff", b"x" * 2000, b"good too"]).view("string")
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=2)
    lane = make_lane(data_config(path, max_bad_fraction=1.0, max_line_bytes=1000, shuffle_documents=1), 1, 0)
    assert documents_in(epoch_tokens(lane))[:2] == ["good", "good too"]
    while lane.state()["epoch"] < 2:
        lane.next_block()
    skipped = lane.state()["skipped"]
    assert set(skipped) == {"null_text", "empty_text", "invalid_utf8", "too_long"}
    assert lane.rows.notes[:2] == [
        "a.parquet: row 4 is not UTF-8; skipped",
        "a.parquet: row 5 longer than data.max_line_bytes; skipped",
    ]
    with pytest.raises(SourceError, match=r"a\.parquet: 2 of 6 rows are bad, .*data\.max_bad_fraction"):
        epoch_tokens(make_lane(data_config(path, max_bad_fraction=0.3, max_line_bytes=1000), 1, 0))


def test_an_empty_file_is_passed_over(tmp_path):
    write_parquet(tmp_path / "a.parquet", [])
    write_parquet(tmp_path / "b.parquet", ["text"])
    lane = make_lane(data_config(tmp_path / "*"), 1, 0)
    for _ in range(10):
        lane.next_block()
    assert lane.state()["skipped"]["empty_shard"] >= 2
    assert set(lane.rows.notes) == {"a.parquet is empty; skipped"}


def test_a_resume_reads_the_footer_and_one_group_of_the_text_alone(tmp_path, monkeypatch):
    texts = [random.Random(n).randbytes(500).hex() for n in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=200)
    read = []
    read_at = LocalFile.read_at

    def counted(self, position, size):
        read.append(size)
        return read_at(self, position, size)

    monkeypatch.setattr(LocalFile, "read_at", counted)
    with closing(open_texts(data_config(path), Shard("a.parquet", str(path)))) as rows:
        assert rows.skip(1501)
        assert rows.take(1) == [texts[1501]]
    assert sum(read) < path.stat().st_size / 5


def test_a_large_row_group_is_read_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "BATCH_BYTES", 1 << 20)
    texts = [random.Random(n).randbytes(100_000).hex() for n in range(150)]  # 30 MB
    settings = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}  # pages of 1 MiB, not one of all
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=1000, **settings)
    before = pyarrow.total_allocated_bytes()
    most = 0
    with closing(open_texts(data_config(path), Shard("a.parquet", str(path)))) as rows:
        for text in texts:
            assert rows.take(1) == [text]
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 8e6


@pytest.mark.parametrize("lanes,names", [(1, "ab"), (3, "a"), (2, "abc")])
def test_a_resume_anywhere_gives_the_very_next_block(tmp_path, lanes, names):
    for seed, name in enumerate(names):
        write_parquet(tmp_path / f"{name}.parquet", [None, "", *some_texts(23, seed=seed, words=25)])
    config = data_config(tmp_path / "*")
    assert_resumes_anywhere(config, lanes)


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_epoch_holds_every_document_once(tmp_path, lanes):
    written = [some_texts(41, seed=seed) for seed in range(2)]
    for seed, texts in enumerate(written):
        write_parquet(tmp_path / f"{seed}.parquet", texts)
    found = []
    for number in range(lanes):
        lane = make_lane(data_config(tmp_path / "*"), lanes, number)
        plan = lane.rows.plan
        paths = [tmp_path / f"{shard}.parquet" for shard in plan.shards]
        share = sum(len(_rows(path, plan.stride, plan.phase)) for path in paths)
        found += documents_in(epoch_tokens(lane))[:share]
    assert Counter(found) == Counter(itertools.chain(*written))


def test_another_column_and_held_out_text(tmp_path):
    texts = some_texts(30)
    path = write_parquet(tmp_path / "a.parquet", texts, column="with.dot")
    assert list(iter_texts(str(path), split="validation", config=data_config(path, text_column="with.dot"))) == texts


@pytest.mark.parametrize(
    "column,said",
    [
        ("body", 'a.parquet has no column "body"; set data.text_column to one of id, text, url'),
        (
            "id",
            'a.parquet: the column "id" holds int64, not strings; set data.text_column to one of those that do (text',
        ),
    ],
)
def test_a_wrong_column_is_told_with_those_there_are(tmp_path, column, said):
    path = write_parquet(tmp_path / "a.parquet", ["text"])
    with pytest.raises(SourceError) as caught:
        check_columns(resolve_shards(str(path), text_column=column), data_config(path))
    assert said in str(caught.value)
    with pytest.raises(SourceError) as again:
        make_lane(data_config(path, text_column=column), 1, 0).next_block()
    assert str(again.value) == str(caught.value)


def test_a_file_that_was_cut_is_told_before_training(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(100))
    local_content(resolve_shards(str(path)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"a\.parquet is no Parquet or cut short: it ends in .*; fetch or write it"):
        local_content(resolve_shards(str(path)))
    with pytest.raises(SourceError, match=r"a\.parquet: its footer cannot be read .*cut short or damaged: fetch"):
        make_lane(data_config(path), 1, 0).next_block()


def test_damage_is_told_with_its_place(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        some_texts(100),
        group_rows=20,
        write_page_checksum=True,
        use_dictionary=False,
    )
    chunk = pyarrow.parquet.read_metadata(path).row_group(2).column(1)
    _damaged(path, chunk.data_page_offset + chunk.total_compressed_size // 2)
    with pytest.raises(SourceError, match=r"a\.parquet: row group 3, from row 41 on, cannot be read \(.*\); the file"):
        epoch_tokens(make_lane(data_config(path, shuffle_documents=1), 1, 0))


@pytest.mark.parametrize("good_reads", [0, 1])
def test_a_disk_that_is_gone_is_an_error_of_the_system(tmp_path, monkeypatch, good_reads):
    path = write_parquet(tmp_path / "a.parquet", [random.Random(n).randbytes(500).hex() for n in range(500)])
    read_at = LocalFile.read_at
    reads = itertools.count()

    def failing(self, position, size):
        if next(reads) >= good_reads:
            raise OSError(errno.EIO, "Input/output error", "a.parquet")
        return read_at(self, position, size)

    monkeypatch.setattr(LocalFile, "read_at", failing)
    with pytest.raises(OSError, match=r"a\.parquet") as caught:
        make_lane(data_config(path), 1, 0).next_block()
    assert caught.value.errno == errno.EIO


def test_a_file_that_changed_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(100))
    shards = resolve_shards(str(path))
    write_parquet(path, some_texts(99))
    with pytest.raises(SourceError, match=r"a\.parquet changed since the start"):
        make_lane(data_config(path), 1, 0, shards=shards).next_block()


@pytest.mark.parametrize("lanes", [1, 3])
def test_faults_at_a_third_of_the_requests_leave_the_tokens_as_they_are(tmp_path, short_waits, lanes):
    names = [f"{n}.parquet" for n in range(12 // lanes)]
    for seed, name in enumerate(names):
        texts = [random.Random(f"{seed} {n}").randbytes(400).hex() for n in range(120)]
        write_parquet(tmp_path / name, texts, group_rows=17)
    here = data_config([f"{tmp_path}/{name}" for name in names], sequence_length=512)
    clean = [make_lane(here, lanes, number) for number in range(lanes)]
    kinds = itertools.cycle(FAULTS)
    rng = random.Random(0)
    before = RETRIES.retries
    with serving(tmp_path, lambda n: next(kinds) if rng.random() < 0.3 else None) as server:
        server.stall_seconds = 0.5
        server.retry_after["429"] = "0"
        there = data_config([f"{server.url}/{name}" for name in names], sequence_length=512)
        for number, expected in enumerate(clean):
            lane = make_lane(there, lanes, number)
            while expected.state()["epoch"] < 1:
                assert np.array_equal(lane.next_block().tokens, expected.next_block().tokens)
                assert lane.state() == expected.state()
            lane.close()
        assert len(server.faults) > 0.2 * len(server.requests) and set(server.faults) == set(FAULTS)
    assert RETRIES.retries - before > len(server.faults) / 2


def test_a_seek_over_http_costs_few_requests_and_bytes(tmp_path, short_waits):
    texts = [random.Random(n).randbytes(500).hex() for n in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=200)
    with serving(tmp_path) as server:
        (shard,) = resolve_shards(f"{server.url}/a.parquet")
        with closing(open_texts(data_config(path), shard)) as rows:
            assert rows.skip(1501)
            assert rows.take(400) == texts[1501:1901]
        ranges = [headers["range"] for _, headers in server.requests]
    assert len(ranges) <= 5, ranges
    asked = [[int(place) for place in text.removeprefix("bytes=").split("-")] for text in ranges]
    assert sum(last - first + 1 for first, last in asked) < path.stat().st_size / 2


def test_a_file_that_changes_at_the_server_is_refused(tmp_path, short_waits):
    path = write_parquet(tmp_path / "a.parquet", [random.Random(n).randbytes(500).hex() for n in range(2000)])
    with serving(tmp_path) as server:
        (shard,) = resolve_shards(f"{server.url}/a.parquet")
        with closing(open_texts(data_config(path), shard)) as rows:
            rows.take(10)
            write_parquet(path, some_texts(10))
            with pytest.raises(SourceError, match=r"a\.parquet changed while it was read"):
                rows.take(1990)


def test_a_server_without_ranges_is_refused_with_the_remedy(tmp_path, short_waits):
    write_parquet(tmp_path / "a.parquet", some_texts(10))
    with (
        serving(tmp_path, ranges=False) as server,
        pytest.raises(SourceError, match=r"a\.parquet: the server answers no ranges, .*; download the file"),
    ):
        make_lane(data_config(f"{server.url}/a.parquet"), 1, 0).next_block()


def test_a_server_that_stays_away(tmp_path, short_waits):
    write_parquet(tmp_path / "a.parquet", some_texts(1000), group_rows=100)
    with serving(tmp_path, lambda n: "503" if n > 2 else None) as server:
        lane = make_lane(data_config(f"{server.url}/a.parquet", timeout_seconds=0.3), 1, 0)
        with pytest.raises(SourceError, match=r"a\.parquet at byte \d+: gave up after 0\.3 s .*status 503"):
            epoch_tokens(lane)


def test_a_place_in_words(tmp_path, tokenizer_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(60))
    with TrainStream(
        data_config(path), tokenizer_path=tokenizer_path, batch_size=2, lanes=2, rank=0, world_size=1
    ) as stream:
        state = next(stream).state
        words = stream.describe(state)
    place = f"behind {state['1']['item']} of rows 1 to 8 of share 2 of 2 (shuffled)"
    assert words[1] == f"lane 1: epoch 0, a.parquet, {place} and {state['1']['offset']} tokens of the next document"


def test_an_interpreter_ends_in_the_middle_of_a_file_over_http(tmp_path, short_waits):
    write_parquet(tmp_path / "a.parquet", [random.Random(n).randbytes(500).hex() for n in range(2000)])
    code = (
        "import sys; from tests.tools.data_tools import *; "
        "print(make_lane(data_config(sys.argv[1]), 1, 0).next_block().tokens[0])"
    )
    with serving(tmp_path) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{server.url}/a.parquet"], capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "256\n", "")
