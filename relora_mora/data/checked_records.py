"""Whether records can be tokenized at all, seen in the first of them, before anything expensive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from relora_mora.config import DataConfig
from relora_mora.data.encoders import record_encoder
from relora_mora.data.errors import SourceError
from relora_mora.data.plain_text import open_rows
from relora_mora.data.record_format import Record
from relora_mora.data.rows import Encoded
from relora_mora.data.skipped import Skipped
from relora_mora.data.sources import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_ROWS = 16


def check_records(shards: Sequence[Shard], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Looks at the first rows of one shard of each source.

    Raises SourceError where none of them can be used, and where the tokenizer or the template cannot be.
    """
    held = [shard for shard in shards if shard.holds_records]
    for _, some in itertools.groupby(held, lambda shard: (shard.source, shard.records)):
        shard = next(some)
        assert shard.records is not None
        encode = record_encoder(tokenizer, shard.records)
        with closing(open_rows(config, shard)) as opened:
            taken = opened.take(_FIRST_ROWS)
        rows = encode([row for row in taken if isinstance(row, Record)])
        if any(isinstance(row, Encoded) for row in rows):
            continue
        told = [row.told for row in rows if isinstance(row, Skipped)]
        told += [f"one {row.told or row.reason}" for row in taken if isinstance(row, Skipped)]
        if told:
            raise SourceError(f"{shard.name}: none of its first {len(taken)} rows can be used as a record; {told[0]}")
