"""Shards, settings and a tokenizer of bytes for the tests of the data package."""

import gzip
import itertools
import json
import random
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import zstandard

from relora_mora.config.data import DataConfig
from relora_mora.data.held_out import load_eval_set
from relora_mora.data.lanes import lane_parts
from relora_mora.data.read import iter_texts, open_rows
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards, shards_of
from relora_mora.data.stream.lane import Lane

EOS = 256


def encode(texts: list[str]) -> list[Encoded]:
    """A token for each byte, so that tokens can be read as text again."""
    return [Encoded(list(text.encode())) for text in texts]


def documents_in(tokens: Iterable[int]) -> list[str]:
    """The whole documents of a stream of tokens that starts with EOS."""
    tokens = [int(token) for token in tokens]
    assert tokens[0] == EOS
    ends = [at for at, token in enumerate(tokens) if token == EOS]
    return [bytes(tokens[a + 1 : b]).decode() for a, b in itertools.pairwise(ends)]


def line(text: Any) -> bytes:
    return json.dumps({"url": "https://example.org/", "text": text}, ensure_ascii=False).encode()


def _table(texts: Iterable[str | None], column: str) -> Any:
    import pyarrow

    values = texts if isinstance(texts, pyarrow.Array) else pyarrow.array(list(texts), "string")
    return pyarrow.table({"id": range(len(values)), column: values, "url": ["x"] * len(values)})


def write_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A file with a line of JSON for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_parquet(
    path: Path, texts: Iterable[str | None], *, group_rows: int = 7, column: str = "text", **settings: Any
) -> Path:
    """Texts between two other columns, in row groups."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(_table(texts, column), path, row_group_size=group_rows, **settings)
    return path


def write_arrow(
    path: Path,
    texts: Iterable[str | None],
    *,
    group_rows: int = 7,
    column: str = "text",
    stream: bool = True,
    compression: str | None = None,
) -> Path:
    """The same table in record batches."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    table = _table(texts, column)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=group_rows):
            writer.write_batch(batch)
    return path


def csv_row(text: str) -> bytes:
    """A row of write_shard's CSV."""
    return ('x,"' + text.replace('"', '""') + '",').encode()


WRITE_GROUPS = {".parquet": write_parquet, ".arrow": write_arrow}
# by format: how a text is written, what comes before the first, and what comes after each
_WRITTEN = {".csv": (csv_row, b"url,text,id\n", b"\n"), ".txt": (str.encode, b"", b"\n\n")}


def write_shard(path: Path, lines: Iterable[bytes | str]) -> Path:
    """A shard of raw lines (bytes) or texts (str; Parquet and Arrow hold only these), in the format of its suffix."""
    if path.suffix in WRITE_GROUPS:
        return WRITE_GROUPS[path.suffix](path, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = next((suffix for suffix in path.suffixes if suffix in _WRITTEN), ".json")
    write, head, end = _WRITTEN.get(kind, (line, b"", b"\n"))
    body = head + b"".join((entry if isinstance(entry, bytes) else write(entry)) + end for entry in lines)
    if path.suffix == ".gz":
        body = gzip.compress(body, mtime=0)
    elif path.suffix == ".zst":
        body = zstandard.compress(body)
    path.write_bytes(body)
    return path


def some_texts(count: int, *, seed: int = 0, words: int = 30) -> list[str]:
    """Texts that all differ, of different lengths, not only ASCII."""
    rng = random.Random(seed)
    vocabulary = ["the", "of", "größer", "日本", "rank", "merge", "a", "matrix", "🙂", "over"]
    return [f"{seed}-{n} " + " ".join(rng.choices(vocabulary, k=rng.randint(0, words))) for n in range(count)]


def write_shards(
    folder: Path, shards: int, texts_each: int, *, suffix: str = ".json.gz", words: int = 30
) -> list[list[str]]:
    """The texts of each shard written."""
    written = [some_texts(texts_each, seed=n, words=words) for n in range(shards)]
    for n, texts in enumerate(written):
        write_shard(folder / f"part-{n:05d}{suffix}", texts)
    return written


def data_config(source: Any, **settings: Any) -> DataConfig:
    given = {"sequence_length": 32, "workers": 0, "shuffle_documents": 8, "timeout_seconds": 20.0, **settings}
    sources = source if isinstance(source, list) else str(source)
    return DataConfig(**{"train": sources, "validation": sources, **given})


def resolve_shards(sources: Any, revision: str = "main", split: Any = "train", **settings: Any) -> list[Shard]:
    """The shards that sources name, with these settings."""
    return shards_of(sources, data_config("unused", revision=revision, **settings), split)


def make_lane(config: DataConfig, lanes: int, lane: int, state: Any = None, encode: Any = encode) -> Lane:
    shards = configured_shards(config, "train")
    parts = lane_parts(config, lanes, len(shards))[lane]
    return Lane(lane, parts, shards, config, lambda shard: encode, eos=EOS, restored=state)


def epoch_tokens(lane: Lane) -> list[int]:
    """All tokens of a lane until its second epoch has begun."""
    tokens = [EOS]
    while lane.state()["epoch"] == 0:
        block = lane.next_block().tokens
        assert block[0] == tokens[-1]  # the last token of a block is the first of the next
        tokens += block[1:].tolist()
    return tokens


def rows_of(
    path: Path, lanes: int = 1, lane: int = 0, skip: int = 0, column: str = "text", **settings: Any
) -> list[Any]:
    """All rows of a lane's share of a file after the first ``skip``, including those without text."""
    config = data_config(path, **{"max_bad_fraction": 1.0, **settings})
    shard = Shard(path.name, str(path), text_column=column)
    with closing(open_rows(config, shard, stride=lanes, phase=lane)) as rows:
        assert rows.skip(skip) or not shard.format.in_ranges  # lines may end before the last lane's turn
        return [row for part in iter(lambda: rows.take(5), []) for row in part]


def texts_of(source: Path | str, split: str = "train", **settings: Any) -> list[str]:
    """All texts of one side of the data."""
    return list(iter_texts(str(source), split=split, config=data_config(source, **settings)))


def eval_set(
    source: Path | str, tokenizer: str, length: int = 16, max_tokens: int | None = None, **settings: Any
) -> Any:
    """The held-out text of a source, in sequences of so many tokens."""
    config = data_config(source, **settings)
    given = {"tokenizer_path": tokenizer, "sequence_length": length, "max_tokens": max_tokens}
    return load_eval_set(str(source), config=config, **given)
