"""Opens the rows of shards of every format: texts, records or tokens. In plain text every document is a row."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import DataConfig
from relora_mora.data.columns import ArrowRows, ParquetRows
from relora_mora.data.errors import SourceError
from relora_mora.data.lines import LineRows
from relora_mora.data.rows import Encoded, EncodeTexts, Rows
from relora_mora.data.shard import ARROW, PARQUET, Shard
from relora_mora.data.tokens.rows import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def open_rows(
    config: DataConfig,
    shard: Shard,
    *,
    stride: int = 1,
    phase: int = 0,
    bad: int = 0,
    note: Callable[[str], object] = log.warning,
) -> Rows[Any]:
    """The texts, records or tokens of a shard of any format (see ``rows.OpenRows``).

    Only the limits and ``sample_by`` of ``config`` are used.
    """
    if shard.tokens is not None:
        return TokenRows(shard, stride, phase, bad)
    reader = {PARQUET: ParquetRows, ARROW: ArrowRows}.get(shard.format, LineRows)
    return reader(config, shard, stride, phase, bad=bad, note=note)


def check_is_text(shard: Shard) -> None:
    """Raises SourceError for a shard of tokens or records."""
    if shard.tokens is not None:
        raise SourceError(f"{shard.location} holds tokens, but text is needed here; give the text of these tokens")
    if shard.holds_records:
        raise SourceError(
            f"{shard.label} is read as records (data.records), but text is needed here; set data.records=null, or its "
            "kind to text"
        )


def text_encoder(tokenizer: "PreTrainedTokenizerBase") -> EncodeTexts:
    """A function that tokenizes texts. All tokens are scored."""
    from relora_mora.tokenizer.load import encode

    return lambda texts: [Encoded(ids) for ids in encode(tokenizer, texts)]
