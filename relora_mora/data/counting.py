"""How much training text there is: what a run of some epochs must know before its schedule can be drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import closing

from relora_mora.config import DataConfig, Packing
from relora_mora.data.encoded_rows import judged
from relora_mora.data.encoders import encoder_of, packing_of
from relora_mora.data.errors import SourceError
from relora_mora.data.judged_records import too_many_records
from relora_mora.data.lanes import LaneRows, plan_lanes
from relora_mora.data.rows_in_order import rows_in_order
from relora_mora.data.sources import Shard, configured_shards
from relora_mora.data.token_checks import epoch_tokens
from relora_mora.data.token_rows import open_any
from relora_mora.data.whole import WholeLane


def count_tokens(config: DataConfig, tokenizer_path: str, *, lanes: int) -> int:
    """Tokens of one epoch: in a stream with the EOS behind each document, of whole rows with what fills sequences up.

    Reads all of the text, and judges all of its records; of tokens made in advance the number is known. Raises
    SourceError, also where there are none.
    """
    shards = configured_shards(config, "train")
    packing = packing_of(config, shards)
    if packing == "stream":
        tokens = _stream_tokens(shards, config, tokenizer_path)
    else:
        tokens = _blocks(shards, config, tokenizer_path, lanes, packing) * config.sequence_length
    if not tokens:
        given = ", ".join(source.source for source in config.train_sources)
        raise SourceError(f"the training data {given} holds no text; give a source with at least one document")
    return tokens


def _stream_tokens(shards: Sequence[Shard], config: DataConfig, tokenizer_path: str) -> int:
    from relora_mora.tokenizer import load_tokenizer

    tokens = epoch_tokens(shards)
    if tokens is not None:
        return tokens
    rows = rows_in_order(shards, config, load_tokenizer(tokenizer_path), "stream")
    return sum(len(row.encoded.ids) + 1 for row in rows)


def _blocks(shards: Sequence[Shard], config: DataConfig, tokenizer_path: str, lanes: int, packing: Packing) -> int:
    """Those that all lanes give in their first epoch. Raises SourceError where too many of its records are bad."""
    from relora_mora.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    length = config.sequence_length
    encode = encoder_of(tokenizer, shards[0].records, packing, length)
    blocks = bad = seen = 0
    last_bad = ""
    for plan in plan_lanes(lanes, len(shards), whole=config.whole_shards):
        lane = WholeLane(
            LaneRows(plan, shards, config, functools.partial(open_any, config)),
            encode,
            eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
            sequence_length=length,
            fills=packing == "whole",
        )
        with closing(lane):
            blocks += lane.epoch_blocks()
        of_lane = judged(lane.encoded.first_epoch)
        bad += of_lane[0]
        seen += of_lane[1]
        last_bad = lane.encoded.last_bad or last_bad
    if fault := too_many_records(bad, seen, config.max_bad_fraction, last_bad, whole=True):
        raise fault
    return blocks
