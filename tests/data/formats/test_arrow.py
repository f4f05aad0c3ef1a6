"""Arrow files and streams, every type of string, damage that pyarrow would not notice, and sets of save_to_disk."""

from __future__ import annotations

import json
import random
import shutil
import struct
import threading
from collections import Counter
from contextlib import closing

import pyarrow
import pytest

from relora_mora.data.bytes import retry
from relora_mora.data.bytes.local import LocalFile
from relora_mora.data.bytes.remote import RemoteFile
from relora_mora.data.content import local_content
from relora_mora.data.errors import SourceError
from relora_mora.data.formats.file_rows import iter_texts, open_rows
from relora_mora.data.shard import Shard
from relora_mora.data.sources.resolve import resolve_shards
from tests.tools.data_tools import data_config, some_texts, texts_of, write_arrow, write_shard
from tests.tools.faulty_server import COMMIT, serving


def _as_polars_writes(path):
    """Removes the length of a file's first message, the schema, so that only the footer locates its batches."""
    body = bytearray(path.read_bytes())
    end = 16 + struct.unpack_from("<i", body, 12)[0]
    body[8:end] = body[16:end] + bytes(8)
    path.write_bytes(body)


@pytest.mark.parametrize("written", ["stream", "file", "file of polars"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize(
    "kind",
    [
        "string",
        "large_string",
        "string_view",
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.uint32(), pyarrow.string_view()),
    ],
)
def test_files_and_streams_of_every_kind_of_string_and_compression(tmp_path, written, compression, kind):
    texts = [*some_texts(20), None, "", "größer\0", "twice", "twice"]
    values = pyarrow.array(texts, "string")
    if isinstance(kind, str):
        values = values.cast(kind)
    else:
        encoded = values.dictionary_encode()
        indices = encoded.indices.cast(kind.index_type)
        values = pyarrow.DictionaryArray.from_arrays(indices, encoded.dictionary.cast(kind.value_type))
    path = tmp_path / "a.arrow"
    write_arrow(path, values, group_rows=9, stream=written == "stream", compression=compression)
    if written == "file of polars":
        _as_polars_writes(path)
    local_content(resolve_shards(str(path)))
    assert texts_of(path) == [text for text in texts if text]
    found = []
    for lane in range(5):
        with closing(open_rows(data_config(path), Shard("a.arrow", str(path)), stride=5, phase=lane)) as rows:
            found += rows.take(100)
    assert len(found) == len(texts)
    assert Counter(row for row in found if isinstance(row, str)) == Counter(text for text in texts if text)


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_a_batch_uses_the_dictionaries_before_it(tmp_path, new):
    path = tmp_path / "a.arrow"
    parts = [["a", "b"], ["a", "b", "c"], ["d"] if new is pyarrow.ipc.new_stream else ["a", "b", "c", "d"]]
    arrays = [pyarrow.DictionaryArray.from_arrays(range(len(part)), pyarrow.array(part)) for part in parts]
    schema = pyarrow.schema({"text": arrays[0].type})
    options = pyarrow.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with new(str(path), schema, options=options) as writer:
        for array in arrays:
            writer.write_batch(pyarrow.record_batch([array], schema=schema))
    assert texts_of(path) == [text for part in parts for text in part]
    with closing(open_rows(data_config(path), Shard("a.arrow", str(path)), stride=3, phase=1)) as rows:
        assert rows.take(9) == parts[1]


@pytest.mark.parametrize("stream", [True, False])
def test_any_cut_and_any_changed_byte_is_text_or_one_message(tmp_path, stream):
    texts = some_texts(30)
    path = write_arrow(tmp_path / "a.arrow", texts, stream=stream)
    body = path.read_bytes()
    rng = random.Random(0)
    name = body.index(b"url")  # of a column
    for place in [name, *(None for _ in range(300))]:
        damaged = bytearray(body)
        damaged[rng.randrange(len(body)) if place is None else place] ^= 255
        path.write_bytes(damaged)
        try:
            texts_of(path)
        except SourceError as error:
            assert "a.arrow" in str(error)
    for _ in range(50):
        path.write_bytes(body[: rng.randrange(len(body))])
        with pytest.raises(SourceError, match=r"is not Arrow or was cut short"):
            local_content(resolve_shards(str(path)))
        with pytest.raises(SourceError, match=r"a\.arrow: its schema cannot be read .*: fetch or write it again"):
            texts_of(path)


@pytest.mark.parametrize("stream", [True, False])
def test_a_seek_reads_only_the_beginning_of_other_batches(tmp_path, monkeypatch, stream):
    texts = [random.Random(n).randbytes(500).hex() for n in range(2000)]
    path = write_arrow(tmp_path / "a.arrow", texts, group_rows=200, stream=stream)
    read = []
    read_at = LocalFile.read_at
    monkeypatch.setattr(
        LocalFile, "read_at", lambda self, position, size: read.append(size) or read_at(self, position, size)
    )
    with closing(open_rows(data_config(path), Shard("a.arrow", str(path)))) as rows:
        assert rows.skip(1501)
        assert rows.take(1) == [texts[1501]]
    assert sum(read) < path.stat().st_size / 5


def test_a_file_on_a_server_is_read_by_the_thread_that_asks_for_it(tmp_path, short_waits, monkeypatch):
    """A request in a thread of pyarrow could not be stopped."""
    texts = some_texts(40)
    write_arrow(tmp_path / "a.arrow", texts, stream=False)
    _as_polars_writes(tmp_path / "a.arrow")
    threads = set()
    read_at = RemoteFile.read_at
    monkeypatch.setattr(RemoteFile, "read_at", lambda *args: threads.add(threading.current_thread()) or read_at(*args))
    with serving(tmp_path, lambda n: "503" if n % 3 == 1 else None) as server:
        assert texts_of(f"{server.url}/a.arrow") == texts
    assert threads == {threading.current_thread()}


@pytest.fixture
def saved(tmp_path):
    """A set of two files and one with two splits, as save_to_disk writes them."""
    import datasets

    datasets.disable_progress_bars()
    texts = {"train": some_texts(50, seed=1), "validation": some_texts(9, seed=2)}
    sets = {split: datasets.Dataset.from_dict({"text": texts[split]}) for split in texts}
    sets["train"].save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "both")
    write_shard(tmp_path / "one" / "stale.arrow", ["of an earlier save"])
    return texts


def test_a_folder_written_by_save_to_disk_is_read(tmp_path, saved, monkeypatch):
    assert texts_of(tmp_path / "one") == saved["train"]
    assert texts_of(tmp_path / "both") == saved["train"]
    assert texts_of(tmp_path / "both", "validation") == saved["validation"]
    assert texts_of(f"{tmp_path}/both::validation") == saved["validation"]
    refused = {"one": "has no split validation; its splits are train", "both::dev": "splits are train, validation"}
    for name, said in refused.items():
        with pytest.raises(SourceError, match=said):
            resolve_shards(f"{tmp_path}/{name}", split="validation")
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.002)
    with serving(tmp_path / "both", lambda n: "503" if n % 3 == 1 else None) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        (shard,) = resolve_shards("some/set")
        assert shard.name == f"hub:some/set@{COMMIT}/train/data-00000-of-00001.arrow"
        config = data_config("some/set")
        assert list(iter_texts("some/set", split="validation", config=config)) == saved["validation"]


def test_a_set_without_rows_is_refused(tmp_path):
    import datasets

    empty = datasets.Dataset.from_dict({"text": []})
    empty.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": empty}).save_to_disk(tmp_path / "both")
    for state in tmp_path.rglob("state.json"):  # datasets 4.0 writes a file without rows, later versions no file
        for file in state.parent.glob("*.arrow"):
            file.unlink()
        state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": []}))
    for name in ("one", "both"):
        with pytest.raises(SourceError, match=rf"{name}: its split train has no rows \(save_to_disk\); give a set or"):
            resolve_shards(str(tmp_path / name))


def test_an_incomplete_folder_of_save_to_disk_gives_one_message(tmp_path, saved):
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match=r"save_to_disk, and data-00001-of-00002\.arrow is missing .*; copy or write"):
        resolve_shards(str(tmp_path / "one"))
    shutil.rmtree(tmp_path / "both" / "train")
    with pytest.raises(SourceError, match=r"both was written by save_to_disk, and train/state\.json is missing"):
        resolve_shards(str(tmp_path / "both"))
    for content in ("{", json.dumps(["train"])):
        (tmp_path / "both" / "dataset_dict.json").write_text(content)
        with pytest.raises(SourceError, match=r"both: dataset_dict\.json is not a JSON object; write the set again"):
            resolve_shards(str(tmp_path / "both"))
