"""What decides the blocks of a stream, as one number: a run resumes only on a stream with the same one."""

from __future__ import annotations

import json
from collections.abc import Sequence

import xxhash

from relora_mora.config import DataConfig
from relora_mora.data.sources import Shard, Split, resolve_shards

# the rule by which shards become lanes and lanes blocks; a change of it that moves a token gets a new name
RULE = "lanes-1"


def fingerprint(
    config: DataConfig, *, tokenizer_fingerprint: str, batch_lanes: int, split: Split = "train", shards: Sequence[Shard] | None = None
) -> str:
    """32 hex digits over tokenizer, shards (names, and sizes of local ones), lanes, sequence length, seed and what skips lines.

    Not over ranks, workers or where the files lie. ``shards`` saves resolving the sources again. Raises SourceError.
    """
    if shards is None:
        sources = config.train if split == "train" else config.validation
        shards = resolve_shards(sources, config.revision, split=split, timeout_seconds=config.timeout_seconds)
    content = {
        "rule": RULE,
        "split": split,
        "tokenizer": tokenizer_fingerprint,
        "shards": [[shard.name, shard.size] for shard in shards],
        "lanes": batch_lanes,
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "shuffle_documents": config.shuffle_documents,
        "max_line_bytes": config.max_line_bytes,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
