"""The speed at which text becomes blocks, compared with the bare tokenizer on the same text."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from relora_mora.config.data import DataConfig
from relora_mora.data.formats.file_rows import check_is_text
from relora_mora.data.lanes import LaneRows, plan_lanes
from relora_mora.data.rows import Encode, Encoded
from relora_mora.data.shard import Shard
from relora_mora.data.sources.resolve import configured_shards, resolve_shards
from relora_mora.data.stream.packing import Lane
from relora_mora.data.tokens.folder import make_tokens
from relora_mora.data.tokens.rows import only_tokens, open_any, or_tokens

# lanes of the one worker that is measured: few, so that it uses its blocks of documents and does not only load them
LANES_READ = 2
# a round with pre-tokenized data reads this many times as many tokens, because it is that much faster
TIMES_IN_ADVANCE = 20
IN_ADVANCE = "data/tokens_per_second_in_advance"


def pipeline_throughput(
    config: DataConfig, tokenizer_path: str, *, lanes: int | None = None, tokens: int = 1_000_000, rounds: int = 3
) -> dict[str, float | int]:
    """Tokens per second of one worker (read, decompress, parse, shuffle, tokenize, pack) and of the bare tokenizer.

    Both run in this process on the same documents, in turns, for ``rounds`` rounds of at least ``tokens`` tokens; the
    fastest round of each counts. Then a worker reads the same documents pre-tokenized. ``lanes`` is the number of lanes
    that share the shards; None: as many as shards, at most 64. If the training data are tokens, only reading them is
    measured. Raises SourceError.
    """
    from relora_mora.tokenizer.load import encode, load_tokenizer

    shards = configured_shards(config, "train")
    lanes = lanes or min(64, len(shards))
    numbers = {"data/lanes": lanes, "data/shards": len(shards)}
    if all(shard.tokens for shard in shards):
        return {IN_ADVANCE: _tokens_per_second(config, shards, lanes, TIMES_IN_ADVANCE * tokens, rounds), **numbers}
    for shard in shards:
        check_is_text(shard)
    tokenizer: Any = load_tokenizer(tokenizer_path)
    calls: list[list[str]] = []  # the texts of each call of the tokenizer

    def recorded(texts: list[str]) -> list[Encoded]:
        calls.append(texts)
        return [Encoded(ids) for ids in encode(tokenizer, texts)]

    encode(tokenizer, ["the first call builds caches, and is not measured"])
    pipeline_seconds = []
    bare_seconds = []
    count = 0
    for _ in range(rounds):
        calls.clear()
        text_lanes = _lanes(config, shards, lanes, or_tokens(recorded), tokenizer.eos_token_id)
        pipeline_seconds.append(_seconds_for(text_lanes, tokens))
        began = time.perf_counter()
        count = sum(len(ids) + 1 for texts in calls for ids in encode(tokenizer, texts))
        bare_seconds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.json")
        text.write_text("\n".join(json.dumps({"text": text}) for texts in calls for text in texts), encoding="utf-8")
        out = Path(folder, "tokens")
        plain = config.model_copy(update={"text_column": "text"})
        make_tokens(resolve_shards(str(text)), out, config=plain, tokenizer_path=tokenizer_path, processes=1)
        in_advance = _tokens_per_second(plain, resolve_shards(str(out)), LANES_READ, TIMES_IN_ADVANCE * tokens, rounds)
    return {
        "data/tokens_per_second_per_worker": count / min(pipeline_seconds),
        "data/tokens_per_second_tokenizer": count / min(bare_seconds),
        "data/ratio": min(bare_seconds) / min(pipeline_seconds),
        IN_ADVANCE: in_advance,
        **numbers,
    }


def _tokens_per_second(config: DataConfig, shards: Sequence[Shard], lanes: int, tokens: int, rounds: int) -> float:
    """Tokens per second of a worker that reads pre-tokenized data; the fastest round counts."""
    token_file = shards[0].tokens
    assert token_file is not None, "text"
    eos = token_file.making.eos
    seconds = [_seconds_for(_lanes(config, shards, lanes, only_tokens, eos), tokens) for _ in range(rounds)]
    return tokens / min(seconds)


def _lanes(config: DataConfig, shards: Sequence[Shard], lanes: int, encode: Encode[Any], eos: int) -> list[Lane[Any]]:
    return [
        Lane(
            LaneRows(plan, shards, config, partial(open_any, config)),
            encode,
            eos=eos,
            sequence_length=config.sequence_length,
        )
        for plan in plan_lanes(lanes, len(shards))[:LANES_READ]
    ]


def _seconds_for(lanes: Sequence[Lane[Any]], tokens: int) -> float:
    """Seconds until the lanes together have produced at least ``tokens`` tokens; closes the lanes."""
    began = time.perf_counter()
    for _ in range(-(-tokens // (len(lanes) * lanes[0].sequence_length))):
        for lane in lanes:
            lane.next_block()
    seconds = time.perf_counter() - began
    for lane in lanes:
        lane.close()
    return seconds
