"""Text in two formats with good and bad rows, the same text as tokens, and streams of both."""

from __future__ import annotations

import itertools
import json

import torch

from relora_mora.data.lanes import merge_states
from relora_mora.data.stream.stream import TrainStream
from relora_mora.data.tokens.make import make_tokens
from tests.tools.data_tools import data_config, resolve_shards, some_texts, write_parquet, write_shard, write_shards

KINDS = [".json.gz", ".parquet"]
BATCH = 16
LIMITS = {"max_bad_fraction": 0.9, "max_line_bytes": 150}  # shorter than some texts: every format has bad rows


def bad_lines(number: int) -> list:
    """Good lines among bad ones of several kinds."""
    return [b"not JSON", "", *some_texts(20, seed=50 + number), b'{"url": "no text"}', b"", b"<html>", "the last"]


def write_text(folder, kind):
    """More and fewer shards than lanes; good, empty and bad texts; an empty shard."""
    write_shards(folder / "few", 3, 45, suffix=kind)
    write_shards(folder / "many", 11, 12, suffix=kind)
    for number in range(2):
        if kind == ".parquet":
            write_parquet(folder / "bad" / f"{number}{kind}", [None, "", *some_texts(30, seed=number), None])
        else:
            write_shard(folder / "bad" / f"{number}{kind}", bad_lines(number))
    write_shard(folder / "odd" / f"empty{kind}", [])
    write_shard(folder / "odd" / f"full{kind}", some_texts(30))


def make(source, out, tokenizer_path, *, processes=1, **settings):
    """Pre-tokenizes the text of a source into the folder ``out``."""
    config = data_config(source, **LIMITS, **settings)
    shards = resolve_shards(config.train, text_column=config.text_column)
    return make_tokens(shards, out, config=config, tokenizer_path=tokenizer_path, processes=processes)


def batches_of(source, tokenizer_path, *, steps, world_size=1, state=None, lanes=8, **settings):
    """For each step, the batch of all ranks and the state after it."""
    config = data_config(source, **LIMITS, document_mask=True, **settings)
    given = {"tokenizer_path": tokenizer_path, "batch_size": BATCH, "lanes": lanes, "world_size": world_size}
    streams = [TrainStream(config, rank=rank, state=state, **given) for rank in range(world_size)]
    taken = []
    try:
        for _ in range(steps):
            batches = [next(stream) for stream in streams]
            rows = [torch.cat([b.input_ids, b.labels, b.document_ids], 1).tolist() for b in batches]
            counts = [{key: count for key, count in b.counts.items() if key != "retries"} for b in batches]
            states = json.loads(json.dumps(merge_states(b.state for b in batches)))
            taken.append((sorted(itertools.chain(*rows)), counts, states))
    finally:
        for stream in streams:
            stream.close()
    return taken
