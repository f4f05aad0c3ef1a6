"""Reads and tokenizes the rows of shards once, in order, for evaluation, for counting and to show them."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from relora_mora.config.data import DataConfig, Packing
from relora_mora.data.bad_rows import NOTES_PER_REASON, RecordsFound
from relora_mora.data.errors import ENCODING_REASONS, Skipped
from relora_mora.data.formats.file_rows import open_rows
from relora_mora.data.records.encoders import encoder_of
from relora_mora.data.rows import Encoded, in_calls
from relora_mora.data.shard import Shard
from relora_mora.data.tokens.rows import open_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

_ROWS_PER_CALL = 64


class TokenizedRow(NamedTuple):
    encoded: Encoded
    utf8_bytes: int | None  # of its text; None if not all of the text is scored


def rows_in_order(
    shards: Sequence[Shard],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    packing: Packing,
    counts: RecordsFound | None = None,
) -> Iterator[TokenizedRow]:
    """The usable rows. Records that cannot be used are logged, and counted in ``counts``.

    Raises SourceError if a shard cannot be read, if more than ``max_bad_fraction`` of its rows or of all records are
    bad, or if no record fits into a sequence.
    """
    counts = RecordsFound() if counts is None else counts
    for record_format, same_format in itertools.groupby(shards, lambda shard: shard.records):
        encode = encoder_of(tokenizer, [record_format], packing, config.sequence_length)
        for group in in_calls(_read(same_format, config), _ROWS_PER_CALL, lambda row: len(row[0])):
            sizes = [size for _, size in group]
            for row, size in zip(encode([row for row, _ in group]), sizes, strict=True):
                counts.add(row)
                if isinstance(row, Encoded):
                    yield TokenizedRow(row, None if row.cut else size)
                elif row.reason in ENCODING_REASONS:
                    if counts.bad <= NOTES_PER_REASON:
                        log.warning("%s; skipped", row.detail)
                    if fault := counts.too_many(config.max_bad_fraction):
                        raise fault
    if fault := counts.fault(shards[0].label, config.max_bad_fraction, whole=True):
        raise fault


def _read(shards: Iterable[Shard], config: DataConfig) -> Iterator[tuple[Any, int | None]]:
    """The rows, each with the UTF-8 bytes of its text if it is plain text."""
    for shard in shards:
        if shard.tokens is not None:
            with closing(open_tokens(shard)) as tokens:
                yield from tokens.documents()
            continue
        with closing(open_rows(config, shard)) as rows:
            # one row at a time, so that nothing after the last wanted row is waited for or reported
            while taken := rows.take(1):
                for row in taken:
                    if not isinstance(row, Skipped):
                        yield row, len(row.encode()) if isinstance(row, str) else None
