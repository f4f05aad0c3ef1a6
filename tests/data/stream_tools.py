"""Training streams for the tests of the data package."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.shard import Shard
from relora_mora.data.sources.resolve import configured_shards
from relora_mora.data.stream.stream import TrainStream
from relora_mora.data.tokens.make import tokens_of_whole_rows

BATCH, LANES = 8, 4


@functools.cache
def _cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def shards_with_tokens(config: DataConfig, tokenizer: str) -> list[Shard]:
    """The shards of training data, with tokens in place of rows that are packed whole, as a run makes them."""
    shards = configured_shards(config, "train")
    cache = Path(_cache().name, hashlib.sha256(config.model_dump_json().encode()).hexdigest())
    made = tokens_of_whole_rows(shards, config, tokenizer, cache)
    return [made.get(number, shard) for number, shard in enumerate(shards)]


def stream_of(config: DataConfig, tokenizer: str, rank: int = 0, ranks: int = 1, **settings: Any) -> TrainStream:
    """One rank's stream of training data."""
    given = {"batch_size": BATCH, "lanes": LANES, **settings}
    if "shards" not in given:
        given["shards"] = shards_with_tokens(config, tokenizer)
    return TrainStream(config, tokenizer_path=tokenizer, rank=rank, world_size=ranks, **given)
