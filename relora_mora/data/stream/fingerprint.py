"""Fingerprints of a training stream: a run resumes only on a stream whose blocks are decided by the same things."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

from relora_mora.config.data import DataConfig
from relora_mora.data.formats.kinds import TEXT
from relora_mora.data.records.encoders import how_written, packing_of
from relora_mora.data.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# version of the rule that turns shards into lanes and lanes into blocks; a change that moves a token needs a new name
RULE = "lanes-4"


def fingerprints(
    config: DataConfig,
    *,
    tokenizer_fingerprint: str,
    batch_lanes: int,
    shards: Sequence[Shard],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple[str, str]:
    """Two fingerprints of 32 hex digits: of the blocks of a stream, and of the meaning of a saved position.

    The first covers the tokenizer, the shards (names, sizes of local ones, text columns), lanes, sequence length, seed
    and the limits on lines; for a mixture also its weights, and for records everything that decides their tokens (only
    they need ``tokenizer``). Ranks, workers and the folders of the files do not matter. The second covers which
    document and which token come at a position. It leaves out the sizes of shards, so a shard that was repaired or has
    grown can be read on from the same line. Raises SourceError.
    """
    order = {
        "rule": RULE,
        "tokenizer": tokenizer_fingerprint,
        "shards": [[shard.name, shard.source, shard.text_column] for shard in shards],
        "lanes": batch_lanes,
        "seed": config.seed,
        "shuffle_documents": config.shuffle_documents,
        "concatenate": config.concatenate,
    }
    if any(shard.format is TEXT for shard in shards):
        order["sample_by"] = config.sample_by
    order |= _record_order(config, shards, tokenizer)
    blocks = order | {
        "split": "train",
        "sizes": [shard.size for shard in shards],
        "sequence_length": config.sequence_length,
        "max_line_bytes": config.max_line_bytes,
    }
    if config.is_mixture:
        blocks["weights"] = {source.label: source.weight for source in config.train_sources}
        blocks["stages"] = [stage.model_dump() for stage in config.stages]
    return _digest(blocks), _digest(order)


def _record_order(
    config: DataConfig, shards: Sequence[Shard], tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[str, Any]:
    """The additional entries for records, and for rows that are not packed as a stream."""
    order: dict[str, Any] = {}
    by_source = {shard.source: shard for shard in shards}
    records = {source: shard.records for source, shard in by_source.items() if shard.records is not None}
    if records:
        assert tokenizer is not None, "its encoding of records is part of the fingerprint"
        order["records"] = {
            source: [
                each.settings.model_dump(exclude={"template"}),  # not its name: how_written has its text
                *([] if each.is_text else how_written(tokenizer, each)),
            ]
            for source, each in records.items()
        }
    packings = {source: packing_of(config, [shard]) for source, shard in by_source.items()}
    if set(packings.values()) != {"stream"}:  # then a position depends on what fits into a sequence
        order["packing"] = packings
        order["sequence_length"] = config.sequence_length
    return order


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
