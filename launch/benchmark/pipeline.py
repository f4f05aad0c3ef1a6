"""How fast text becomes blocks, beside the tokenizer alone on the same text."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from relora_mora.config import DataConfig
from relora_mora.data.lanes import LaneRows, plan_lanes
from relora_mora.data.packing import Lane
from relora_mora.data.plain_text import open_texts
from relora_mora.data.rows import Encoded
from relora_mora.data.sources import configured_shards

# by the one worker that is measured; few, so that its blocks of documents are used up and not only loaded
LANES_READ = 2


def pipeline_throughput(
    config: DataConfig, tokenizer_path: str, *, lanes: int | None = None, tokens: int = 1_000_000, rounds: int = 3
) -> dict[str, float | int]:
    """Tokens per second of one worker (read, decompress, parse, shuffle, tokenize, pack) and of the bare tokenizer.

    Both run in this process on the same documents, in turns, ``rounds`` times over at least ``tokens`` tokens; the
    fastest round of each counts. ``lanes`` is the number of lanes that share the shards; None: as many as shards, at
    most 64. Raises SourceError.
    """
    from relora_mora.tokenizer import encode, load_tokenizer

    shards = configured_shards(config, "train")
    lanes = lanes or min(64, len(shards))
    tokenizer: Any = load_tokenizer(tokenizer_path)
    calls: list[list[str]] = []  # the texts of each call of the tokenizer

    def recorded(texts: list[str]) -> list[Encoded]:
        calls.append(texts)
        return [Encoded(ids) for ids in encode(tokenizer, texts)]

    encode(tokenizer, ["what is built at first use is part of neither"])
    pipeline_seconds = []
    bare_seconds = []
    made = 0
    for _ in range(rounds):
        calls.clear()
        read = [
            Lane(
                LaneRows(plan, shards, config, partial(open_texts, config)),
                recorded,
                eos=tokenizer.eos_token_id,
                sequence_length=config.sequence_length,
            )
            for plan in plan_lanes(lanes, len(shards))[:LANES_READ]
        ]
        began = time.perf_counter()
        for _ in range(-(-tokens // (len(read) * config.sequence_length))):
            for lane in read:
                lane.next_block()
        pipeline_seconds.append(time.perf_counter() - began)
        for lane in read:
            lane.close()
        began = time.perf_counter()
        made = sum(len(ids) + 1 for texts in calls for ids in encode(tokenizer, texts))
        bare_seconds.append(time.perf_counter() - began)
    return {
        "data/tokens_per_second_per_worker": made / min(pipeline_seconds),
        "data/tokens_per_second_tokenizer": made / min(bare_seconds),
        "data/ratio": min(bare_seconds) / min(pipeline_seconds),
        "data/lanes": lanes,
        "data/shards": len(shards),
    }
