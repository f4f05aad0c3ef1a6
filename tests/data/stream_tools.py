"""Training streams for the tests of the data package."""

import functools
import hashlib
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from relora_mora.config.data import DataConfig
from relora_mora.data.lanes import merge_states
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards
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
    return tokens_of_whole_rows(shards, config, tokenizer, cache)


def stream_of(config: DataConfig, tokenizer: str, rank: int = 0, ranks: int = 1, **settings: Any) -> TrainStream:
    """One rank's stream of training data."""
    given = {"batch_size": BATCH, "lanes": LANES, **settings}
    shards = given.pop("shards", None) or shards_with_tokens(config, tokenizer)
    return TrainStream(config, shards, tokenizer_path=tokenizer, rank=rank, world_size=ranks, **given)


class Step(NamedTuple):
    """A global batch: its tensors in the order of lanes as lists, the state of all lanes, and the sums of counts."""

    tensors: list[Any]
    state: dict[str, Any]
    counts: dict[str, int]


def steps_of(
    config: DataConfig, tokenizer: str, ranks: int, steps: int, after: Step | None = None, **settings: Any
) -> list[Step]:
    """So many steps on so many ranks, from the beginning or from the state after a step (then give ``step``, too)."""
    given = {"state": after and after.state, "shards": shards_with_tokens(config, tokenizer), **settings}
    taken = []
    with ExitStack() as stack:
        streams = [stack.enter_context(stream_of(config, tokenizer, rank, ranks, **given)) for rank in range(ranks)]
        for _ in range(steps):
            batches = [next(stream) for stream in streams]
            parts = [
                torch.stack([each for each in (batch.input_ids, batch.labels, batch.document_ids) if each is not None])
                for batch in batches
            ]  # of each rank, which has every ``ranks``-th lane
            by_lane = [part.unflatten(1, (given.get("lanes", LANES) // ranks, -1)) for part in parts]
            names = [name for name in batches[0].counts if not name.startswith(("retries", "epoch"))]
            counts = {name: sum(batch.counts[name] for batch in batches) for name in names}
            state = json.loads(json.dumps(merge_states([batch.state for batch in batches])))
            taken.append(Step(torch.stack(by_lane, 2).flatten(1, 3).tolist(), state, counts))
    return taken
