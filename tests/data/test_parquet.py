"""Parquet: only the text column is read, each row once, and a resume does not read the rows before its position."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing

import pyarrow
import pyarrow.parquet
import pytest

from relora_mora.data import columns
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.local import LocalFile
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, epoch_tokens, make_lane, rows_of, some_texts, write_parquet
from tests.tools.each import each


def _damaged(path, at, count=1):
    body = bytearray(path.read_bytes())
    body[at : at + count] = bytes(byte ^ 255 for byte in body[at : at + count])
    path.write_bytes(bytes(body))
    return path


@each("kind", ["string", "large_string", "string_view", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
@each("compression", ["none", "snappy", "zstd", "gzip"])
def test_every_kind_of_string_and_compression(tmp_path, kind, compression):
    texts = [*some_texts(20), None, "", "größer\0", "twice", "twice"]
    values = pyarrow.array(texts, "string")
    values = values.cast(kind) if isinstance(kind, str) else values.dictionary_encode()
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=9, compression=compression)
    kept = {None: Skipped("null_text"), "": Skipped("empty_text")}
    for lanes in (1, 5):
        found = [row for lane in range(lanes) for row in rows_of(path, lanes, lane)]
        assert Counter(map(str, found)) == Counter(str(kept.get(text, text)) for text in texts)


def test_a_resume_reads_only_the_footer_and_one_group_of_the_text(tmp_path, monkeypatch):
    texts = [random.Random(n).randbytes(500).hex() for n in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=200)
    read = []
    read_at = LocalFile.read_at

    def counted(self, position, size):
        read.append(size)
        return read_at(self, position, size)

    monkeypatch.setattr(LocalFile, "read_at", counted)
    with closing(open_rows(data_config(path), Shard("a.parquet", str(path)))) as rows:
        assert rows.skip(1501)
        assert rows.take(1) == [texts[1501]]
    assert sum(read) < path.stat().st_size / 5


def test_a_large_row_group_is_read_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BATCH_BYTES", 1 << 20)
    texts = [random.Random(n).randbytes(100_000).hex() for n in range(150)]  # 30 MB
    settings = {
        "compression": "none",
        "use_dictionary": False,
        "write_batch_size": 1,
    }  # pages of 1 MiB, not a single one
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=1000, **settings)
    before = pyarrow.total_allocated_bytes()
    most = 0
    with closing(open_rows(data_config(path), Shard("a.parquet", str(path)))) as rows:
        for text in texts:
            assert rows.take(1) == [text]
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 8e6


def test_damage_is_reported_with_its_place(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", some_texts(100), group_rows=20, write_page_checksum=True, use_dictionary=False
    )
    chunk = pyarrow.parquet.read_metadata(path).row_group(2).column(1)
    _damaged(path, chunk.data_page_offset + chunk.total_compressed_size // 2)
    with pytest.raises(SourceError, match=r"a\.parquet: row group 3, from row 41 on, cannot be read \(.*\); the file"):
        epoch_tokens(make_lane(data_config(path, shuffle_documents=1), 1, 0))
