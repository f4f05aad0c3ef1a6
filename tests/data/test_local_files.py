"""Lines of bounded length, and files that have changed."""

from __future__ import annotations

import errno
import gzip
import json
import os
from contextlib import closing

import pytest

from relora_mora.data.errors import SourceError
from relora_mora.data.read import open_rows
from relora_mora.data.sets.check import check_columns
from relora_mora.data.sets.reading import iter_texts
from relora_mora.data.shard import Shard
from tests.tools.data_tools import data_config, lines_of, resolve_shards, some_texts, write_shard
from tests.tools.each import each


@each("indent", [None, 1])
@each("name", ["a.json", "a.json.gz"])
def test_one_array_in_json_is_one_message_before_training(tmp_path, name, indent):
    body = json.dumps([{"text": text} for text in some_texts(20)], indent=indent).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    config = data_config(path)
    message = rf"{name} is one JSON array, not JSON lines .*: jq -c '\.\[\]' OLD\.json > NEW\.jsonl"
    with pytest.raises(SourceError, match=message):
        check_columns(resolve_shards(str(path)), config)
    with pytest.raises(SourceError, match=message):
        list(iter_texts(str(path), split="train", config=config))


def test_an_unreadable_file(tmp_path):
    with pytest.raises(SourceError, match=r"gone\.json cannot be read \(No such file"):
        open_rows(data_config("gone.json"), Shard("gone.json", str(tmp_path / "gone.json")))


def test_too_many_lanes_for_the_files_that_may_be_open(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.json", some_texts(5))

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr("relora_mora.data.local.io.FileIO", refuse)
    with pytest.raises(SourceError, match=r"a\.json .* \(Too many open files\); raise ulimit -n, or lower data\.lanes"):
        lines_of(path)


def test_a_file_that_changes_while_it_is_read_is_refused_then_or_when_it_is_opened_again(tmp_path):
    path = write_shard(tmp_path / "a.json", some_texts(20_000))
    config = data_config(path)
    (shard,) = resolve_shards(str(path))
    with closing(open_rows(config, shard)) as rows:
        assert rows.skip(100)
        with path.open("ab") as file:
            file.write(b"more\n" * 1000)
        assert rows.skip(19_900)
        assert rows.take(1) == []
    with pytest.raises(SourceError, match=r"changed since the start: [\d,]+ bytes then, [\d,]+ now; use data that"):
        open_rows(config, shard)
    (shard,) = resolve_shards(str(path))
    with closing(open_rows(config, shard)) as rows:
        assert rows.skip(100)
        os.truncate(path, path.stat().st_size - 1000)
        with pytest.raises(SourceError, match=r"a\.json changed since the start: [\d,]+ bytes when it was opened, "):
            rows.skip(30_000)
