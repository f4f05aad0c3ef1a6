"""Arrow files and streams, every type of string, damage, memory, and what is refused."""

from __future__ import annotations

import random
import struct
from collections import Counter
from contextlib import closing

import pyarrow
import pytest

from relora_mora.data.content import content_of
from relora_mora.data.errors import SourceError
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Shard
from tests.tools.data_tools import (
    data_config,
    resolve_shards,
    rows_of,
    some_texts,
    texts_of,
    write_arrow,
    write_parquet,
)
from tests.tools.each import each


def _as_polars_writes(path):
    """Removes the length of a file's first message, the schema, so that only the footer locates its batches."""
    body = bytearray(path.read_bytes())
    end = 16 + struct.unpack_from("<i", body, 12)[0]
    body[8:end] = body[16:end] + bytes(8)
    path.write_bytes(body)


@each("written", ["stream", "file", "file of polars", "parquet"])
@each("compression", [None, "lz4", "zstd"])
@each(
    "kind",
    [
        "string",
        "large_string",
        "string_view",
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.uint32(), pyarrow.string_view()),
    ],
)
def test_every_format_kind_of_string_and_compression(tmp_path, written, compression, kind):
    texts = [*some_texts(20), None, "", "größer\0", "twice", "twice"]
    values = pyarrow.array(texts, "string")
    if isinstance(kind, str):
        values = values.cast(kind)
    else:
        encoded = values.dictionary_encode()
        indices = encoded.indices.cast(kind.index_type)
        values = pyarrow.DictionaryArray.from_arrays(indices, encoded.dictionary.cast(kind.value_type))
    path = tmp_path / ("a.parquet" if written == "parquet" else "a.arrow")
    if written == "parquet" and "string_view" in str(kind) and isinstance(kind, pyarrow.DictionaryType):
        pytest.skip("pyarrow does not write it")
    if written == "parquet":
        write_parquet(path, values, group_rows=9, compression=compression or "none")
    else:
        write_arrow(path, values, group_rows=9, stream=written == "stream", compression=compression)
    if written == "file of polars":
        _as_polars_writes(path)
    content_of(resolve_shards(str(path)))
    assert texts_of(path) == [text for text in texts if text]
    found = []
    for lane in range(5):
        found += rows_of(path, 5, lane)
    assert len(found) == len(texts)
    assert Counter(row for row in found if isinstance(row, str)) == Counter(text for text in texts if text)


@each("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_a_batch_uses_the_dictionaries_before_it(tmp_path, new):
    path = tmp_path / "a.arrow"
    parts = [["a", "b"], ["a", "b", "c"], ["d"] if new is pyarrow.ipc.new_stream else ["a", "b", "c", "d"]]
    arrays = [pyarrow.DictionaryArray.from_arrays(range(len(part)), pyarrow.array(part)) for part in parts]
    schema = pyarrow.schema({"text": arrays[0].type})
    options = pyarrow.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with new(str(path), schema, options=options) as writer:
        for array in arrays:
            writer.write_batch(pyarrow.record_batch([array], schema=schema))
    texts = [text for part in parts for text in part]
    assert texts_of(path) == texts
    with closing(open_rows(data_config(path), Shard("a.arrow", str(path)), stride=3, phase=1)) as rows:
        assert rows.take(9) == texts[len(texts) // 3 : 2 * len(texts) // 3]


def test_a_stream_that_is_cut_between_two_batches_is_named(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", some_texts(30))
    body = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(body) - 8)
    with pytest.raises(SourceError, match=r"a\.arrow: its schema cannot be read \(it does not end as a stream does\)"):
        texts_of(path)


def test_one_compressed_batch_of_a_file_is_in_memory_at_a_time(tmp_path):
    texts = [random.Random(n).randbytes(5000).hex() for n in range(1000)]
    path = write_arrow(tmp_path / "a.arrow", texts, group_rows=20, stream=False, compression="zstd")
    before = pyarrow.total_allocated_bytes()
    most = 0
    with closing(open_rows(data_config(path), Shard("a.arrow", str(path)))) as rows:
        while rows.take(10):
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < sum(map(len, texts)) / 10
