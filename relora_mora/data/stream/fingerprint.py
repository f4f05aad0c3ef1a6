"""What decides the blocks of a stream, as one number: a run resumes only on a stream with the same one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

from relora_mora.config.data import DataConfig
from relora_mora.data.formats.kinds import TEXT
from relora_mora.data.records.encoders import how_written, packing_of
from relora_mora.data.shard import RecordFormat, Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# the rule by which shards become lanes and lanes blocks; a change of it that moves a token gets a new name
RULE = "lanes-4"


def fingerprints(
    config: DataConfig,
    *,
    tokenizer_fingerprint: str,
    batch_lanes: int,
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[str, str]:
    """32 hex digits over what decides the blocks of a stream, and over what gives a saved position its meaning.

    The first is over the tokenizer, the shards (names, sizes of local ones, text columns), lanes, sequence length, seed
    and what limits lines; of a mixture also its weights, of records what decides their tokens (then ``tokenizer`` is
    needed). Not over ranks, workers or where the files lie. The second, over which document and which token comes at a
    position, leaves out the sizes of shards: one that was repaired or has grown is read on from the same line. Raises
    SourceError.
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
    config: DataConfig, shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """What records add, and rows that are no stream."""
    order: dict[str, Any] = {}
    by_source = {shard.source: shard for shard in shards}
    records = {source: shard.records for source, shard in by_source.items() if shard.records is not None}
    if records:
        assert tokenizer is not None, "how it writes records is part of the fingerprint"
        order["records"] = {source: _how_read(held, tokenizer) for source, held in records.items()}
    packings = {source: packing_of(config, [shard]) for source, shard in by_source.items()}
    if set(packings.values()) != {"stream"}:  # then a position depends on what fits into a sequence
        order["packing"] = packings
        order["sequence_length"] = config.sequence_length
    return order


def _how_read(held: RecordFormat, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    settings = held.settings.model_dump(exclude={"template"})  # whose text counts
    return [settings, *(() if held.is_text else how_written(tokenizer, held))]


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
